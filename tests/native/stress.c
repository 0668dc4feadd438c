/* The thread pool by itself: callers in several threads, jobs of every size, pauses, forks. To be run under sanitizers;
 * ends with status 1 if any piece of any job was not done exactly once.
 */
#define POOL_ALONE
#include "../../xpoptim/engines/cpu/native.c"

#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CALLERS = 4, JOBS = 750, PIECES = 256, MOST = 7 };

typedef struct {
    job head;
    int64_t pieces;
    int64_t done[PIECES]; /* not atomic: that nobody else writes a piece is what is tested */
} counting;

static _Atomic int64_t by_helpers; /* pieces */

/* Each worker takes pieces of its own share, then of the others', as the kernels do. */
static void count(job *head, int64_t worker) {
    counting *c = (counting *)head;
    int64_t workers = head->workers;
    for (int64_t k = 0; k < workers; ++k) {
        int64_t share = (worker + k) % workers;
        int64_t first = c->pieces * share / workers, end = c->pieces * (share + 1) / workers;
        for (;;) {
            int64_t at = first + atomic_fetch_add(&head->cursors[share].next, 1);
            if (at >= end) break;
            c->done[at] += 1;
            by_helpers += worker > 0;
            for (volatile int work = 0; work < 200; ++work) continue;
        }
    }
}

static void scale(void *input, void *scalar) { *(int64_t *)scalar = *(int64_t *)input; }

static int jobs(unsigned seed, int rounds) {
    char *memory = calloc(2 * MOST_WORKERS + 1, sizeof(cursor)); /* NumPy's begins anywhere in a cache line, too */
    cursor *cursors[2] = {(void *)(memory + 8), (void *)(memory + 8 + MOST_WORKERS * sizeof(cursor))};
    int failures = 0;
    for (int n = 0; n < rounds; ++n) {
        int64_t made = 0, scalars[2] = {0, 0};
        counting two[2];
        call calls[2];
        for (int k = 0; k < 2; ++k) {
            memset(&two[k], 0, sizeof two[k]);
            two[k].head.cursors = cursors[k];
            two[k].pieces = rand_r(&seed) % (PIECES + 1);
            calls[k] = (call){k ? scale : NULL, &two[k].pieces, &scalars[k], count, &two[k].head};
        }
        int64_t patience = rand_r(&seed) % 3 * 20000;
        perform(rand_r(&seed) % (MOST + 1), patience, 2, calls, &made);
        for (int k = 0; k < 2; ++k)
            for (int64_t i = 0; i < PIECES; ++i) failures += two[k].done[i] != (i < two[k].pieces);
        failures += made != 1 || scalars[0] != 0 || scalars[1] != two[1].pieces;
        if (rand_r(&seed) % 32 == 0) usleep(rand_r(&seed) % 200);
    }
    free(memory);
    return failures;
}

static void *caller(void *seed) { return (void *)(intptr_t)jobs((unsigned)(uintptr_t)seed, JOBS); }

int main(int count_of_arguments, char **arguments) {
    int failures = 0, forks = count_of_arguments > 1 ? atoi(arguments[1]) : 0;
    pthread_t threads[CALLERS];
    pthread_atfork(NULL, NULL, forget_helpers);
    for (uintptr_t i = 0; i < CALLERS; ++i) pthread_create(&threads[i], NULL, caller, (void *)(i + 1));
    for (int i = 0; i < forks; ++i) { /* in the middle of what the callers do */
        int status = 1;
        pid_t child = fork();
        if (child == 0) _exit(jobs(100 + (unsigned)i, 20) != 0);
        waitpid(child, &status, 0);
        failures += status != 0;
    }
    for (int i = 0; i < CALLERS; ++i) {
        void *failed;
        pthread_join(threads[i], &failed);
        failures += (int)(intptr_t)failed;
    }
    printf("%d jobs, %d forks, %d pieces by helpers, %d failures\n", 2 * CALLERS * JOBS, forks, (int)by_helpers, failures);
    return failures != 0 || by_helpers == 0;
}
