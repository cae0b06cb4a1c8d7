/*
 * shm_memory.c: the memory that a rank shares with the other ranks of its host: made, mapped, lent out in blocks.
 *
 * The heap is reserved address space of a memfd; a block's pages are allocated when it is made (so nobody meets SIGBUS)
 * and given back when it is freed. Blocks may outlive the engine. A large block is made of huge pages where the kernel
 * can do that: sums of arrays that exceed the caches are bound by page walks otherwise (decision 0007).
 */
#define _GNU_SOURCE
#include "shm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1; older kernels refuse it, and pages stay small */
#endif

/* Of x86-64, and of aarch64 with 4 KiB pages; with larger ones collapsing is refused or does nothing. */
enum { HUGE_NBYTES = 2 << 20 };

struct cl_shared {
    struct cl_shm *shm;
    uint64_t first, end;
};

size_t cl_shm_slot_nbytes(const cl_engine *engine)
{
    return CL_PAGE + (size_t)engine->settings.shm_ring_nbytes;
}

size_t cl_shm_slot_offset(const cl_engine *engine, int32_t slot)
{
    return CL_PAGE + (size_t)slot * cl_shm_slot_nbytes(engine);
}

static uint64_t round_up(uint64_t value, uint64_t unit)
{
    return (value + unit - 1) & ~(unit - 1);
}

/* At an address that lies in a huge page as its offset lies in the memfd: else no huge page of it can be mapped whole. */
uint8_t *cl_shm_map(int memfd, size_t nbytes, size_t private_nbytes)
{
    uint8_t *reserved = mmap(NULL, nbytes + HUGE_NBYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED)
        return NULL;
    uint8_t *memory = (uint8_t *)(uintptr_t)round_up((uintptr_t)reserved, HUGE_NBYTES);
    if (memory > reserved)
        munmap(reserved, (size_t)(memory - reserved));
    munmap(memory + nbytes, (size_t)(reserved + HUGE_NBYTES - memory));
    if (mmap(memory, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, memfd, 0) == MAP_FAILED) {
        munmap(memory, nbytes);
        return NULL;
    }
    (void)madvise(memory, private_nbytes, MADV_DONTFORK);
    (void)madvise(memory, nbytes, MADV_DONTDUMP);
    return memory;
}

/* As much address space as the machine has memory, unless the user limits what a process may map or write. */
static size_t heap_reserve(void)
{
    struct rlimit address_space, file_size;
    bool unlimited = getrlimit(RLIMIT_AS, &address_space) == 0 && address_space.rlim_cur == RLIM_INFINITY &&
                     getrlimit(RLIMIT_FSIZE, &file_size) == 0 && file_size.rlim_cur == RLIM_INFINITY;
    long pages = sysconf(_SC_PHYS_PAGES);
    return unlimited && pages > 0 ? (size_t)pages * CL_PAGE : 0;
}

static int make_heap(struct cl_shm *shm)
{
    shm->free_ranges = calloc(1, sizeof(cl_range));
    if (shm->free_ranges == NULL)
        return CL_NO_MEMORY;
    *shm->free_ranges = (cl_range){NULL, shm->heap_offset, shm->nbytes};
    ((cl_memory_header *)shm->memory)->heap_offset = shm->heap_offset;
    return CL_OK;
}

static int allocate(const struct cl_shm *shm, uint64_t first, uint64_t nbytes)
{
    int failed;
    do
        failed = posix_fallocate(shm->memfd, (off_t)first, (off_t)nbytes);
    while (failed == EINTR);
    errno = failed;
    return failed == 0 ? CL_OK : failed == ENOSPC || failed == ENOMEM ? CL_NO_MEMORY : CL_SYSTEM;
}

static int make_memory(struct cl_shm *shm)
{
    shm->doorbell = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    shm->memfd = memfd_create("commlib", MFD_CLOEXEC);
    if (shm->doorbell < 0 || shm->memfd < 0)
        return CL_SYSTEM;
    CL_TRY(allocate(shm, 0, shm->heap_offset));
    size_t reserve = heap_reserve();
    if (reserve > 0 && ftruncate(shm->memfd, (off_t)(shm->heap_offset + reserve)) != 0)
        reserve = 0;
    shm->nbytes = shm->heap_offset + reserve;
    shm->memory = cl_shm_map(shm->memfd, shm->nbytes, shm->heap_offset);
    if (shm->memory == NULL)
        return CL_NO_MEMORY;
    return make_heap(shm);
}

int cl_shm_create(cl_engine *engine, int32_t npeers, int *memfd, int *doorbell)
{
    if (engine->shm != NULL || npeers < 1 || npeers >= engine->size)
        return CL_INVALID;
    struct cl_shm *shm = calloc(1, sizeof(struct cl_shm));
    if (shm == NULL)
        return CL_NO_MEMORY;
    shm->references = 1;
    shm->owner_pid = getpid();
    shm->stages_offset = cl_shm_slot_offset(engine, npeers);
    shm->heap_offset = shm->stages_offset + (size_t)CL_STAGES * CL_STAGE_NBYTES;
    shm->memfd = shm->doorbell = -1;
    pthread_mutex_init(&shm->heap_lock, NULL);
    engine->shm = shm;
    CL_TRY(make_memory(shm)); /* what is there is freed with the engine */
    *memfd = shm->memfd;
    *doorbell = shm->doorbell;
    return CL_OK;
}

bool cl_shm_doorbell(cl_engine *engine, atomic_int **sleeping, int *doorbell)
{
    if (engine->shm == NULL || engine->shm->memory == NULL)
        return false;
    *sleeping = &((cl_memory_header *)engine->shm->memory)->sleeping;
    *doorbell = engine->shm->doorbell;
    return true;
}

static void let_go(struct cl_shm *shm)
{
    if (atomic_fetch_sub(&shm->references, 1) != 1)
        return;
    if (shm->memfd >= 0)
        close(shm->memfd);
    if (shm->memory != NULL && shm->owner_pid == getpid()) /* a child may have got something else there */
        munmap(shm->memory, shm->nbytes);
    for (cl_range *range = shm->free_ranges, *next; range != NULL; range = next) {
        next = range->next;
        free(range);
    }
    pthread_mutex_destroy(&shm->heap_lock);
    free(shm);
}

void cl_shm_free(cl_engine *engine)
{
    if (engine->shm == NULL)
        return;
    if (engine->shm->doorbell >= 0)
        close(engine->shm->doorbell);
    engine->shm->doorbell = -1;
    let_go(engine->shm);
    engine->shm = NULL;
}

/* A child has no use for the descriptors; blocks of the heap stay readable there, and are the parent's. */
void cl_shm_forked(cl_engine *engine)
{
    if (engine->shm == NULL)
        return;
    close(engine->shm->doorbell);
    close(engine->shm->memfd);
    engine->shm->doorbell = engine->shm->memfd = -1;
}

/* ---- blocks of the heap -------------------------------------------------------------------------------------- */

/* First fit, at a multiple of `unit`. What lies before it stays free; a range that is used up goes. */
static bool take_range(struct cl_shm *shm, uint64_t nbytes, uint64_t unit, uint64_t *first)
{
    for (cl_range **at = &shm->free_ranges; *at != NULL; at = &(*at)->next) {
        cl_range *range = *at;
        uint64_t from = round_up(range->first, unit);
        if (from > range->end || range->end - from < nbytes)
            continue;
        if (from > range->first) {
            cl_range *before = malloc(sizeof(cl_range));
            if (before == NULL)
                return false;
            *before = (cl_range){range, range->first, from};
            *at = before;
            at = &before->next;
        }
        *first = from;
        range->first = from + nbytes;
        if (range->first == range->end) {
            *at = range->next;
            free(range);
        }
        return true;
    }
    return false;
}

/* Puts a range back between its neighbours, and joins it with those that it touches. */
static void give_range(struct cl_shm *shm, uint64_t first, uint64_t end)
{
    cl_range **at = &shm->free_ranges, *before = NULL;
    for (; *at != NULL && (*at)->first < first; at = &(*at)->next)
        before = *at;
    cl_range *after = *at;
    if (before != NULL && before->end == first) {
        before->end = end;
        if (after != NULL && after->first == end) {
            before->end = after->end;
            before->next = after->next;
            free(after);
        }
        return;
    }
    if (after != NULL && after->first == end) {
        after->first = first;
        return;
    }
    cl_range *range = malloc(sizeof(cl_range));
    if (range == NULL)
        return; /* the address space is lost to later blocks, the memory is not: its pages are given back */
    *range = (cl_range){after, first, end};
    *at = range;
}

/* What of the block fills huge pages becomes such, if the kernel has them: a page each must be there to begin with. */
static int make_huge(const struct cl_shm *shm, const cl_shared *block)
{
    uint64_t nbytes = (block->end - block->first) & ~(uint64_t)(HUGE_NBYTES - 1);
    for (uint64_t at = 0; at < nbytes; at += HUGE_NBYTES)
        CL_TRY(allocate(shm, block->first + at, CL_PAGE));
    if (nbytes > 0)
        (void)madvise(shm->memory + block->first, (size_t)nbytes, MADV_COLLAPSE);
    return CL_OK;
}

int cl_shared_new(cl_engine *engine, uint64_t nbytes, cl_shared **out)
{
    struct cl_shm *shm = engine->shm;
    if (shm == NULL || shm->memory == NULL)
        return CL_INVALID;
    uint64_t whole = round_up(nbytes == 0 ? 1 : nbytes, CL_PAGE), unit = whole < HUGE_NBYTES ? CL_PAGE : HUGE_NBYTES;
    cl_shared *block = calloc(1, sizeof(cl_shared));
    if (block == NULL || whole < nbytes) {
        free(block);
        return CL_NO_MEMORY;
    }
    pthread_mutex_lock(&shm->heap_lock);
    bool found = take_range(shm, whole, unit, &block->first);
    pthread_mutex_unlock(&shm->heap_lock);
    if (!found) {
        free(block);
        return CL_NO_MEMORY;
    }
    block->end = block->first + whole;
    block->shm = shm;
    atomic_fetch_add(&shm->references, 1);
    int status = make_huge(shm, block);
    if (status == CL_OK)
        status = allocate(shm, block->first, whole);
    if (status != CL_OK) {
        cl_shared_free(block);
        return status;
    }
    *out = block;
    return CL_OK;
}

void *cl_shared_address(const cl_shared *block)
{
    return block->shm->memory + block->first;
}

void cl_shared_free(cl_shared *block)
{
    if (block == NULL || block->shm->owner_pid != getpid())
        return;
    struct cl_shm *shm = block->shm;
    (void)fallocate(shm->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)block->first,
                    (off_t)(block->end - block->first));
    pthread_mutex_lock(&shm->heap_lock);
    give_range(shm, block->first, block->end);
    pthread_mutex_unlock(&shm->heap_lock);
    free(block);
    let_go(shm);
}
