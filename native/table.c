/* table.c: open addressing with linear probing; see table.h. */
#include "table.h"

#include <stdlib.h>

#include "transport.h"

static size_t home(const cl_table *table, uint64_t key)
{
    /* Keys of one name differ by a constant step; the multiplication spreads them. */
    return (size_t)((key * UINT64_C(0x9E3779B97F4A7C15)) >> 32) & (table->capacity - 1);
}

static size_t find(const cl_table *table, uint64_t key)
{
    size_t slot = home(table, key);
    while (table->values[slot] != NULL && table->keys[slot] != key)
        slot = (slot + 1) & (table->capacity - 1);
    return slot;
}

void *cl_table_get(const cl_table *table, uint64_t key)
{
    return table->capacity == 0 ? NULL : table->values[find(table, key)];
}

static int grow(cl_table *table)
{
    size_t capacity = table->capacity == 0 ? 64 : 2 * table->capacity;
    cl_table larger = {malloc(capacity * sizeof(uint64_t)), calloc(capacity, sizeof(void *)), capacity, table->count};
    if (larger.keys == NULL || larger.values == NULL) {
        cl_table_free(&larger);
        return CL_NO_MEMORY;
    }
    for (size_t slot = 0; slot < table->capacity; slot++) {
        if (table->values[slot] == NULL)
            continue;
        size_t to = find(&larger, table->keys[slot]);
        larger.keys[to] = table->keys[slot];
        larger.values[to] = table->values[slot];
    }
    cl_table_free(table);
    *table = larger;
    return CL_OK;
}

int cl_table_put(cl_table *table, uint64_t key, void *value)
{
    if (2 * (table->count + 1) > table->capacity) {
        int status = grow(table);
        if (status != CL_OK)
            return status;
    }
    size_t slot = find(table, key);
    table->count += table->values[slot] == NULL;
    table->keys[slot] = key;
    table->values[slot] = value;
    return CL_OK;
}

/* Closes the hole at `hole` by moving back every later entry of the run whose home allows it. */
static void close_hole(cl_table *table, size_t hole)
{
    size_t mask = table->capacity - 1;
    for (size_t slot = (hole + 1) & mask; table->values[slot] != NULL; slot = (slot + 1) & mask) {
        size_t from_home = (slot - home(table, table->keys[slot])) & mask;
        if (from_home < ((slot - hole) & mask))
            continue;
        table->keys[hole] = table->keys[slot];
        table->values[hole] = table->values[slot];
        hole = slot;
    }
    table->values[hole] = NULL;
}

void *cl_table_take(cl_table *table, uint64_t key)
{
    if (table->capacity == 0)
        return NULL;
    size_t slot = find(table, key);
    void *value = table->values[slot];
    if (value == NULL)
        return NULL;
    table->count--;
    close_hole(table, slot);
    return value;
}

void cl_table_free(cl_table *table)
{
    free(table->keys);
    free(table->values);
    *table = (cl_table){0};
}
