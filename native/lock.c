/* lock.c: a lock whose waiters sleep, and sleeping on words: futexes, private to this process. See lock.h. */
#define _GNU_SOURCE
#include "lock.h"

#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    FREE = 0,
    HELD,
    WANTED /* held, and somebody sleeps until it is free */
};

static long futex(atomic_int *word, int operation, int value, const struct timespec *timeout)
{
    return syscall(SYS_futex, word, operation | FUTEX_PRIVATE_FLAG, value, timeout, NULL, 0);
}

void cl_futex_wait(atomic_int *word, int value, double timeout_s)
{
    struct timespec timeout = {(time_t)timeout_s, (long)(1e9 * (timeout_s - (double)(time_t)timeout_s))};
    if (atomic_load(word) == value)
        futex(word, FUTEX_WAIT, value, &timeout);
}

void cl_futex_wake_all(atomic_int *word)
{
    futex(word, FUTEX_WAKE, INT_MAX, NULL);
}

void cl_futex_wake(atomic_int *word)
{
    atomic_fetch_add(word, 1);
    cl_futex_wake_all(word);
}

bool cl_try_lock(atomic_int *word)
{
    int expected = FREE;
    return atomic_compare_exchange_strong_explicit(word, &expected, HELD, memory_order_acquire, memory_order_relaxed);
}

void cl_lock(atomic_int *word)
{
    if (cl_try_lock(word))
        return;
    while (atomic_exchange_explicit(word, WANTED, memory_order_acquire) != FREE)
        futex(word, FUTEX_WAIT, WANTED, NULL);
}

void cl_unlock(atomic_int *word)
{
    if (atomic_exchange_explicit(word, FREE, memory_order_release) == WANTED)
        futex(word, FUTEX_WAKE, 1, NULL);
}
