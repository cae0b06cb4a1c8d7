/* lock.h: a lock in one word, zero when free, and words that threads of this process sleep on. */
#ifndef CL_LOCK_H
#define CL_LOCK_H

#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

bool cl_try_lock(atomic_int *word);
void cl_lock(atomic_int *word);
void cl_unlock(atomic_int *word);

/* Sleeps while the word has this value, at most so long. May return before. */
void cl_futex_wait(atomic_int *word, int value, double timeout_s);
/* Wakes all who sleep on the word. */
void cl_futex_wake_all(atomic_int *word);
/* Changes the word, and wakes them. */
void cl_futex_wake(atomic_int *word);

#endif
