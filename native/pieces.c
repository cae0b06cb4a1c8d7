/*
 * pieces.c: one piece of memory and many small ones that lie elsewhere, copied there and back in one call.
 *
 * A framework makes every small gradient in memory of its own; they travel together. It knows addresses and bytes.
 */
#include <string.h>

#include "commlib.h"

void cl_gather(void *whole, const uintptr_t *pieces, const uint64_t *nbytes, size_t count)
{
    uint8_t *to = whole;
    for (size_t i = 0; i < count; to += nbytes[i++])
        if (nbytes[i] > 0) /* the address of nothing may be NULL */
            memcpy(to, (const void *)pieces[i], nbytes[i]);
}

void cl_scatter(const void *whole, const uintptr_t *pieces, const uint64_t *nbytes, size_t count)
{
    const uint8_t *from = whole;
    for (size_t i = 0; i < count; from += nbytes[i++])
        if (nbytes[i] > 0)
            memcpy((void *)pieces[i], from, nbytes[i]);
}
