/* How long a helper stays awake, by a clock of the test's own on which a second begins meanwhile: each offer of the CPU
 * takes a nanosecond. Prints how often it offers its CPU before it sleeps.
 */
#define _GNU_SOURCE
#define POOL_ALONE
#define clock_gettime clock_of_the_test
#define sched_yield yield_of_the_test
#define pthread_cond_wait sleep_of_the_test
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static struct timespec present = {7, 999999900};
static int yields;

int clock_of_the_test(clockid_t clock, struct timespec *t) { return *t = present, clock != CLOCK_MONOTONIC; }

int yield_of_the_test(void) {
    ++yields;
    if (++present.tv_nsec == 1000000000) present.tv_sec += 1, present.tv_nsec = 0;
    return 0;
}

int sleep_of_the_test(pthread_cond_t *condition, pthread_mutex_t *lock) {
    (void)condition, (void)lock;
    printf("%d\n", yields);
    exit(0);
}

#include "../../xpoptim/engines/cpu/native.c"

int main(void) {
    helper h = {.patience = 400, .state = AWAKE};
    pthread_mutex_init(&h.lock, NULL);
    serve(&h);
    (void)perform, (void)forget_helpers;
    return 1;
}
