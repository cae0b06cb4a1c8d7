/* table.h: a hash table from 64-bit keys to pointers. Keys are hashes already; a deleted slot is closed by shifting back. */
#ifndef CL_TABLE_H
#define CL_TABLE_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint64_t *keys;
    void **values; /* NULL: free slot */
    size_t capacity, count; /* capacity is a power of two, at least twice the count */
} cl_table;

/* NULL if the key is not there. */
void *cl_table_get(const cl_table *table, uint64_t key);
/* Sets or replaces. `value` is not NULL. Returns CL_OK or CL_NO_MEMORY. */
int cl_table_put(cl_table *table, uint64_t key, void *value);
/* Removes and returns the value, or NULL. */
void *cl_table_take(cl_table *table, uint64_t key);
void cl_table_free(cl_table *table);

#endif
