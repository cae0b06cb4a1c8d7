/*
 * fuzz_main.c: for compilers without libFuzzer: runs inputs that were kept, and random changes of them. One seed, one run.
 *
 * argv: how many random inputs, the first seed, then files and folders of inputs. An input that fails is left in fuzz_failed.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuzz.h"

enum { MOST_INPUTS = 4096, MOST_NBYTES = 1 << 14, LONGEST_S = 100 };

typedef struct {
    uint8_t *data;
    size_t nbytes;
} input;

static input inputs[MOST_INPUTS];
static size_t ninputs;

static void read_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL && ninputs < MOST_INPUTS);
    input *in = &inputs[ninputs++];
    CHECK((in->data = malloc(MOST_NBYTES)) != NULL);
    in->nbytes = fread(in->data, 1, MOST_NBYTES, file);
    fclose(file);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* In order of their names: what a seed draws does not depend on the folder's own order. */
static void read_folder(const char *path)
{
    static char *names[MOST_INPUTS];
    size_t count = 0;
    DIR *folder = opendir(path);
    CHECK(folder != NULL);
    for (const struct dirent *entry; (entry = readdir(folder)) != NULL && count < MOST_INPUTS;)
        if (entry->d_name[0] != '.')
            CHECK(asprintf(&names[count++], "%s/%s", path, entry->d_name) > 0);
    closedir(folder);
    qsort(names, count, sizeof names[0], by_name);
    for (size_t i = 0; i < count; i++) {
        read_file(names[i]);
        free(names[i]);
    }
}

/* Before it runs: a crash leaves no time for it. */
static void keep(const uint8_t *data, size_t nbytes)
{
    FILE *file = fopen("fuzz_failed", "wb");
    CHECK(file != NULL && fwrite(data, 1, nbytes, file) == nbytes);
    fclose(file);
}

static void try(const uint8_t *data, size_t nbytes)
{
    keep(data, nbytes);
    alarm(LONGEST_S);
    (void)LLVMFuzzerTestOneInput(data, nbytes);
}

static void change(uint8_t *data, size_t *nbytes, uint64_t *random)
{
    size_t at = *nbytes == 0 ? 0 : next_random(random) % *nbytes, length = 1 + next_random(random) % 16;
    switch (next_random(random) % 4) {
    case 0: data[at] ^= (uint8_t)(1 << next_random(random) % 8); break;
    case 1: data[at] = (uint8_t)next_random(random); break;
    case 2: /* some are put in between */
        length = *nbytes + length > MOST_NBYTES ? MOST_NBYTES - *nbytes : length;
        memmove(data + at + length, data + at, *nbytes - at);
        for (size_t i = 0; i < length; i++)
            data[at + i] = (uint8_t)next_random(random);
        *nbytes += length;
        break;
    default: /* the rest comes from another input */
        if (ninputs > 0) {
            const input *other = &inputs[next_random(random) % ninputs];
            if (other->nbytes > at) {
                memcpy(data + at, other->data + at, other->nbytes - at);
                *nbytes = other->nbytes;
            }
        }
    }
}

static void try_random(uint64_t seed)
{
    static uint8_t data[MOST_NBYTES + 16];
    uint64_t random = seed * UINT64_C(0x9E3779B97F4A7C15) + 1;
    size_t nbytes = 0;
    for (int i = 0; i < 8; i++)
        next_random(&random);
    if (ninputs > 0 && next_random(&random) % 4 > 0) {
        const input *in = &inputs[next_random(&random) % ninputs];
        memcpy(data, in->data, nbytes = in->nbytes);
    } else {
        for (nbytes = next_random(&random) % 1000; data[0] = (uint8_t)seed, nbytes < 2; nbytes++)
            ;
        for (size_t i = 0; i < nbytes; i++)
            data[i] = (uint8_t)next_random(&random);
    }
    for (uint64_t changes = 1 + next_random(&random) % 8; changes > 0; changes--)
        change(data, &nbytes, &random);
    try(data, nbytes);
}

int main(int argc, char **argv)
{
    CHECK(argc >= 3);
    uint64_t count = strtoull(argv[1], NULL, 10), first = strtoull(argv[2], NULL, 10);
    for (int i = 3; i < argc; i++) {
        struct stat status;
        CHECK(stat(argv[i], &status) == 0);
        (S_ISDIR(status.st_mode) ? read_folder : read_file)(argv[i]);
    }
    for (size_t i = 0; i < ninputs; i++)
        try(inputs[i].data, inputs[i].nbytes);
    for (uint64_t seed = first; seed < first + count; seed++)
        try_random(seed);
    for (size_t i = 0; i < ninputs; i++)
        free(inputs[i].data);
    (void)unlink("fuzz_failed");
    printf("%zu inputs that were kept and %llu others passed\n", ninputs, (unsigned long long)count);
    return 0;
}
