/* The hot path of the CPU engine, where a microsecond counts: helper threads, the look at NumPy's arrays before a step,
 * and a whole step as one call. Python builds the tables that the structs below describe (`watch.py`, `thread_pool.py`);
 * the kernels are machine code of LLVM's. With POOL_ALONE defined there are the threads only, without Python: so
 * they are put to the test under sanitizers.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

/* ---------------------------------------------------------------------------------------------------------------------
 * Helper threads. The calling thread is worker 0 of a job and always works too. What no helper has begun when the caller
 * is through is called off, so that a busy machine costs little. To wake a sleeping thread takes as long as the step of
 * a small model: a helper stays awake for as long as the last job told it to, and offers its CPU to others meanwhile.
 */

enum { MOST_WORKERS = 64, CACHE_LINE = 64, SPINS = 1000 };
enum { ASLEEP, AWAKE, POSTED, WORKING }; /* states of a helper */
enum { FREE, TAKEN };                    /* whether a caller has it */

/* How far a worker has come in its share, a cache line from the others. */
typedef struct { _Atomic int64_t next; char apart[CACHE_LINE - sizeof(int64_t)]; } cursor;
typedef struct { cursor *cursors; int64_t workers; } job; /* how every job begins */
typedef void run_function(job *, int64_t worker);
typedef struct { void (*prologue)(void *, void *); void *inputs, *scalars; run_function *run; job *job; } call;

typedef struct {
    _Alignas(2 * CACHE_LINE) _Atomic int64_t state; /* CPUs fetch cache lines in pairs */
    _Atomic int64_t patience;                       /* nanoseconds to stay awake */
    _Atomic int owner;
    int64_t worker;
    run_function *run;
    job *job;
    pthread_t thread;
    _Alignas(2 * CACHE_LINE) pthread_mutex_t lock;
    _Alignas(2 * CACHE_LINE) pthread_cond_t wake;
#ifdef __linux__
    cpu_set_t cpus; /* those that it was last told to use */
#endif
} helper;

_Static_assert(sizeof(void *) == 8, "the tables that Python makes have fields of 64 bits");

static struct { _Atomic int64_t count; _Atomic int making; helper all[MOST_WORKERS - 1]; } pool;

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int moved(_Atomic int64_t *state, int64_t from, int64_t to) {
    return atomic_compare_exchange_strong(state, &from, to);
}

static void *serve(void *one) {
    helper *h = one;
    for (int64_t idle_since = 0;;) {
        int posted = atomic_load_explicit(&h->state, memory_order_relaxed) == POSTED; /* without taking the line away */
        if (posted && moved(&h->state, POSTED, WORKING)) {
            h->run(h->job, h->worker);
            atomic_store_explicit(&h->state, AWAKE, memory_order_release);
            idle_since = 0;
            continue;
        }
        int64_t t = now();
        if (!idle_since) idle_since = t;
        if (t - idle_since < atomic_load_explicit(&h->patience, memory_order_relaxed)) {
            sched_yield();
            continue;
        }
        moved(&h->state, AWAKE, ASLEEP);
        pthread_mutex_lock(&h->lock);
        while (atomic_load_explicit(&h->state, memory_order_acquire) == ASLEEP) pthread_cond_wait(&h->wake, &h->lock);
        pthread_mutex_unlock(&h->lock);
        idle_since = 0;
    }
    return NULL;
}

/* Have a helper that sleeps wake on another CPU than ours, of those that we may use, if there is one: some kernels would
 * put it beside its caller, where it can only wait. Only on Linux may a thread choose. */
static void keep_off_this_cpu(helper *h) {
#ifdef __linux__
    cpu_set_t cpus;
    int here = sched_getcpu();
    if (here < 0 || here >= CPU_SETSIZE || sched_getaffinity(0, sizeof cpus, &cpus)) return;
    if (CPU_COUNT(&cpus) > 1) CPU_CLR(here, &cpus);
    if (CPU_EQUAL(&cpus, &h->cpus)) return;
    h->cpus = cpus;
    pthread_setaffinity_np(h->thread, sizeof cpus, &cpus);
#else
    (void)h;
#endif
}

static void post(helper *h) {
    if (moved(&h->state, AWAKE, POSTED)) return;
    keep_off_this_cpu(h); /* it sleeps, or is about to and will look again once it holds the lock */
    pthread_mutex_lock(&h->lock);
    atomic_store_explicit(&h->state, POSTED, memory_order_release);
    pthread_cond_signal(&h->wake);
    pthread_mutex_unlock(&h->lock);
}

/* One more helper, asleep; whether there is one. Signals are for the threads of the program. */
static int started(helper *h) {
    pthread_attr_t detached;
    sigset_t all, before;
    memset(h, 0, sizeof *h);
    if (pthread_mutex_init(&h->lock, NULL) || pthread_cond_init(&h->wake, NULL) || pthread_attr_init(&detached)) return 0;
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&h->thread, &detached, serve, h);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&detached);
    return !failed;
}

/* Make helpers until there are so many, unless another thread is about it or the system has no more. */
static void hire(int64_t most) {
    if (most > MOST_WORKERS - 1) most = MOST_WORKERS - 1;
    if (atomic_load(&pool.count) >= most || atomic_exchange(&pool.making, 1)) return;
    for (int64_t n = atomic_load(&pool.count); n < most && started(&pool.all[n]); ++n) atomic_store(&pool.count, n + 1);
    atomic_store(&pool.making, 0);
}

/* In the child of a fork, where the parent's threads do not exist. */
static void forget_helpers(void) {
    atomic_store(&pool.count, 0);
    atomic_store(&pool.making, 0);
}

/* Run one job with at most so many helpers, of those that no other caller has. */
static void together(int64_t most, int64_t patience, run_function *run, job *work) {
    helper *ours[MOST_WORKERS];
    int64_t n = 0, there = atomic_load_explicit(&pool.count, memory_order_acquire);
    for (int64_t i = 0; i < there && n < most; ++i) {
        int wanted = FREE;
        if (atomic_compare_exchange_strong(&pool.all[i].owner, &wanted, TAKEN)) ours[n++] = &pool.all[i];
    }
    work->workers = n + 1;
    for (int64_t i = 0; i <= n; ++i) atomic_store_explicit(&work->cursors[i].next, 0, memory_order_relaxed);
    for (int64_t i = 0; i < n; ++i) {
        atomic_store_explicit(&ours[i]->patience, patience, memory_order_relaxed);
        ours[i]->run = run, ours[i]->job = work, ours[i]->worker = i + 1;
        post(ours[i]);
    }
    run(work, 0);
    for (int64_t i = 0; i < n; ++i) {
        moved(&ours[i]->state, POSTED, AWAKE); /* not begun yet: called off */
        for (int64_t k = 0; atomic_load_explicit(&ours[i]->state, memory_order_acquire) == WORKING; ++k)
            if (k > SPINS) sched_yield();
        atomic_store_explicit(&ours[i]->owner, FREE, memory_order_release);
    }
}

/* Run one job after the other, with nothing of Python's between them. `made` becomes 1 before the first. */
static void perform(int64_t most, int64_t patience, int64_t count, const call *calls, int64_t *made) {
    hire(most);
    *made = 1;
    for (const call *c = calls; c < calls + count; ++c) {
        if (c->prologue) c->prologue(c->inputs, c->scalars); /* makes the scalars of the inputs */
        together(most, patience, c->run, c->job);
    }
}

#ifndef POOL_ALONE
/* ---------------------------------------------------------------------------------------------------------------------
 * The look at arrays. An array can be resized or replaced at any time, so that every step looks at every array anew:
 * its type, dtype, flags, shape, strides and place are compared with what was checked before. Gradients may have moved
 * to where nothing is written: the table's pointers follow them. Any other difference sends the step back to the
 * full checks in Python.
 */

#define Py_LIMITED_API 0x030b0000
#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_1_API_VERSION
#include <Python.h>
#include <numpy/arrayobject.h>

enum { PARAMETERS, GRADIENTS, FIRST_SLOT }; /* columns */

typedef struct {
    PyArray_Descr *dtype;
    int64_t flags, ndim;
    const npy_intp *shape_and_strides;
    uintptr_t *pointer; /* the table's */
    int64_t bytes;
} record;
typedef struct { int64_t *cell, length; } leaf_length;
typedef struct { uintptr_t start, end; } span;
typedef struct {
    int64_t columns, leaves, spans;
    const record *records; /* column by column, as are keys and found */
    const leaf_length *lengths;
    const span *written;   /* in order */
    PyObject *const *keys; /* of each array, where its column's container is a dict */
    PyObject **found;
} watch;
typedef struct {
    const watch *watch;
    PyTypeObject *const *kinds; /* of the containers */
    double *inputs;             /* what the kernels read their scalars from */
    int64_t input_count, count;
    const call *calls;
    int64_t is_long;
} whole_step;

static int same_layout(PyArrayObject *a, const record *r) {
    if (PyArray_DESCR(a) != r->dtype || (PyArray_FLAGS(a) & r->flags) != r->flags || PyArray_NDIM(a) != r->ndim) return 0;
    size_t bytes = (size_t)r->ndim * sizeof(npy_intp);
    return !memcmp(PyArray_DIMS(a), r->shape_and_strides, bytes) &&
           !memcmp(PyArray_STRIDES(a), r->shape_and_strides + r->ndim, bytes);
}

/* Whether nothing that is written lies in a span. `gap` is the written span behind the gradient before: gradients tend to
 * lie side by side. */
static int apart(const watch *w, uintptr_t start, uintptr_t end, int64_t *gap) {
    const span *s = w->written;
    if (*gap < w->spans && end <= s[*gap].start && (!*gap || s[*gap - 1].end <= start)) return 1;
    int64_t low = 0, high = w->spans;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (s[middle].end <= start) low = middle + 1;
        else high = middle;
    }
    *gap = low;
    return low == w->spans || end <= s[low].start;
}

static int same_column(PyObject *container, PyTypeObject *kind, const watch *w, int64_t column) {
    int is_dict = kind == &PyDict_Type, is_array = kind == &PyArray_Type; /* a lone array is its own container */
    if (Py_TYPE(container) != kind) return 0;
    if (!is_array && (is_dict ? PyDict_Size(container) : PyList_Size(container)) != w->leaves) return 0;
    Py_ssize_t position = 0;
    PyObject *key, *item;
    int64_t gap = 0;
    for (int64_t i = 0; i < w->leaves; ++i) {
        int64_t n = column * w->leaves + i;
        const record *r = &w->records[n];
        if (is_array) item = container;
        else if (!is_dict) item = PyList_GetItem(container, i);
        else if (!PyDict_Next(container, &position, &key, &item) || key != w->keys[n]) return 0;
        w->found[n] = item;
        if (column == GRADIENTS) {
            *w->lengths[i].cell = item == Py_None ? 0 : w->lengths[i].length;
            if (item == Py_None) continue;
        }
        if (!PyArray_CheckExact(item) || !same_layout((PyArrayObject *)item, r)) return 0;
        uintptr_t start = (uintptr_t)PyArray_DATA((PyArrayObject *)item);
        if (column != GRADIENTS) {
            if (*r->pointer != start) return 0;
            continue;
        }
        *r->pointer = start;
        if (!apart(w, start, start + (uintptr_t)r->bytes, &gap)) return 0;
    }
    return 1;
}

static int same(PyObject *containers, PyTypeObject *const *kinds, const watch *w) {
    for (int64_t j = 0; j < w->columns; ++j)
        if (!same_column(PyTuple_GetItem(containers, j), kinds[j], w, j)) return 0;
    return 1;
}

/* The arrays are held meanwhile: other threads are let in. False if there is no memory for that. */
static int perform_unlocked(const whole_step *s, int64_t most, int64_t patience, int64_t *made) {
    const watch *w = s->watch;
    int64_t all = w->columns * w->leaves;
    PyObject **held = PyMem_Malloc((size_t)all * sizeof *held); /* not where the next look writes */
    if (!held) return 0;
    for (int64_t i = 0; i < all; ++i) Py_IncRef(held[i] = w->found[i]);
    Py_BEGIN_ALLOW_THREADS
    perform(most, patience, s->count, s->calls, made);
    Py_END_ALLOW_THREADS
    for (int64_t i = 0; i < all; ++i) Py_DecRef(held[i]);
    PyMem_Free(held);
    return 1;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The module. Addresses come as ints; see `_native.pyi`.
 */

/* The arguments from `first` on as words; whether they are so many ints. */
static int words(PyObject *const *args, Py_ssize_t given, Py_ssize_t first, Py_ssize_t wanted, int64_t *to) {
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "takes %zd arguments, not %zd", wanted, given);
        return 0;
    }
    for (Py_ssize_t i = first; i < wanted; ++i)
        if ((to[i] = PyLong_AsLongLong(args[i])) == -1 && PyErr_Occurred()) return 0;
    return 1;
}

static PyObject *py_perform(PyObject *module, PyObject *const *args, Py_ssize_t given) {
    int64_t a[5];
    (void)module;
    if (!words(args, given, 0, 5, a)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    perform(a[0], a[1], a[2], (const call *)a[3], (int64_t *)a[4]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_same(PyObject *module, PyObject *const *args, Py_ssize_t given) {
    int64_t a[3];
    (void)module;
    if (!words(args, given, 1, 3, a)) return NULL;
    return PyBool_FromLong(same(args[0], (PyTypeObject *const *)a[1], (const watch *)a[2]));
}

static int take_in(PyObject *list, double *inputs, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        PyObject *value = PyList_GetItem(list, i);
        if (!value || ((inputs[i] = PyFloat_AsDouble(value)) == -1.0 && PyErr_Occurred())) return 0;
    }
    return 1;
}

static PyObject *py_step(PyObject *module, PyObject *const *args, Py_ssize_t given) {
    int64_t a[6];
    (void)module;
    if (!words(args, given, 2, 6, a)) return NULL;
    const whole_step *s = (const whole_step *)a[2];
    if (!take_in(args[1], s->inputs, s->input_count)) return NULL;
    if (!same(args[0], s->kinds, s->watch)) Py_RETURN_FALSE;
    if (s->is_long) return PyBool_FromLong(perform_unlocked(s, a[3], a[4], (int64_t *)a[5]));
    perform(a[3], a[4], s->count, s->calls, (int64_t *)a[5]);
    Py_RETURN_TRUE;
}

static PyObject *py_states(PyObject *module, PyObject *nothing) {
    (void)module, (void)nothing;
    int64_t count = atomic_load(&pool.count);
    PyObject *states = PyList_New(count);
    for (int64_t i = 0; states && i < count; ++i)
        PyList_SetItem(states, i, PyLong_FromLongLong(atomic_load(&pool.all[i].state)));
    return states;
}

static PyMethodDef methods[] = {
    {"perform", (PyCFunction)(void (*)(void))py_perform, METH_FASTCALL, NULL},
    {"same", (PyCFunction)(void (*)(void))py_same, METH_FASTCALL, NULL},
    {"step", (PyCFunction)(void (*)(void))py_step, METH_FASTCALL, NULL},
    {"states", py_states, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int set_up(PyObject *module) {
    (void)module;
    static _Atomic int registered;
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    return atomic_exchange(&registered, 1) ? 0 : pthread_atfork(NULL, NULL, forget_helpers);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, set_up}, {0, NULL}};
static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "_native", .m_methods = methods, .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
#endif
