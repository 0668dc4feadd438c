// CUDA C++ for a host compiler: what our kernels use of the language, so that g++ can compile the very text that
// NVRTC gets and the host can run it. No header of CUDA's is needed. Included before a kernel's text.
//
// One thread of the host runs everything: the blocks of a grid one after the other, and the threads of a block one
// after the other until the first barrier. A thread that waits at a barrier is set aside on a stack of its own (a
// fibre) and goes on when all have come, so that kernels without barriers never switch stacks.
//
// What cannot be seen here: races of threads that do not lead to another result in either of the two orders, the
// order of atomics, the speed, and the rounding of functions other than + - * / sqrt.
#pragma once
#include <math.h>  // not <cmath>: with this, sqrt(float) is float also outside of namespace std, as it is in CUDA
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>

// --- keywords

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__ &  // in `const T __grid_constant__ t`: all threads read the one t, which may be large
#define __forceinline__ inline
#define __launch_bounds__(...)

// Blocks run in sequence, so a static variable is the memory a block shares. Before each block it is filled with
// ones, a NaN in every format, so that what is read before it is written shows. Not under AddressSanitizer, which
// puts guards around static variables, but only around those that are in no section of their own.
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static
#else
#define __shared__ static __attribute__((section("shared_memory")))
extern "C" char __start_shared_memory[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_shared_memory[] __attribute__((weak, visibility("hidden")));
#endif

// --- types

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
#define HOST_VECTOR(T, NAME, BYTES) \
    struct alignas(2 * BYTES) NAME##2 { T x, y; }; \
    struct alignas(4 * BYTES > 16 ? 16 : 4 * BYTES) NAME##4 { T x, y, z, w; }; \
    inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; } \
    inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
HOST_VECTOR(unsigned short, ushort, 2)
HOST_VECTOR(int, int, 4)
HOST_VECTOR(unsigned, uint, 4)
HOST_VECTOR(float, float, 4)
HOST_VECTOR(long long, longlong, 8)
HOST_VECTOR(unsigned long long, ulonglong, 8)
HOST_VECTOR(double, double, 8)

// --- fibres

namespace host {

const int MOST_THREADS = 1024, WARP = 32, STACK = 64 << 10;

struct Barrier { int members, arrived, round, line; };

struct Fibre { ucontext_t context; char* stack; };

static uint3 thread, block;
static dim3 threads, blocks;
static int backward;            // threads and blocks in descending order
static void (*kernel)(void**);  // the kernel, reading its parameters from an array of pointers
static void** parameters;

static char trouble[200];  // empty, or what went wrong

static ucontext_t scheduler;
static Fibre fibres[MOST_THREADS];
static int made;                         // fibres of this launch
static int idle[MOST_THREADS], idles;    // those without a thread
static int fibre_of[MOST_THREADS];       // of a thread that waits
static Barrier* waits_at[MOST_THREADS];  // of a thread that waits, else null
static int round_of[MOST_THREADS];       // the barrier's round in which it waits
static int count, begun, ended;          // threads of this block: all; begun; ended
static int me, my_fibre;                 // the running thread, numbered within its block
static Barrier whole, warps[MOST_THREADS / WARP];
static uint64_t exchanged[MOST_THREADS][2];  // what the lanes of a warp hand to each other

inline int nth(int n, int of) { return backward ? of - 1 - n : n; }

inline void become(int number) {
    me = number;
    thread = {number % threads.x, number / threads.x % threads.y, number / threads.x / threads.y};
}

// A fibre runs one thread after the other for as long as none has to wait.
inline void run_fibre() {
    for (;;) {
        while (begun < count && !*trouble) {
            become(nth(begun++, count));
            kernel(parameters);
            ++ended;
            if (whole.arrived)
                snprintf(trouble, sizeof trouble, "a thread ends while others wait at the barrier of line %d", whole.line);
        }
        idle[idles++] = my_fibre;
        swapcontext(&fibres[my_fibre].context, &scheduler);
    }
}

inline void resume(int fibre) {
    my_fibre = fibre;
    swapcontext(&scheduler, &fibres[fibre].context);
}

inline void start_fibre() {
    if (!idles) {
        Fibre& fibre = fibres[made];
        if (!fibre.stack) fibre.stack = new char[STACK];
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack;
        fibre.context.uc_stack.ss_size = STACK;
        makecontext(&fibre.context, run_fibre, 0);
        idle[idles++] = made++;
    }
    resume(idle[--idles]);
}

inline void wait(Barrier& barrier, int line) {
    if (barrier.arrived && barrier.line != line)
        snprintf(trouble, sizeof trouble, "threads wait at the barriers of lines %d and %d at once", barrier.line, line);
    if (&barrier == &whole && ended)
        snprintf(trouble, sizeof trouble, "a thread waits at the barrier of line %d after others have ended", line);
    const int number = me, fibre = my_fibre;
    waits_at[number] = &barrier;
    round_of[number] = barrier.round;
    fibre_of[number] = fibre;
    barrier.line = line;
    if (++barrier.arrived == barrier.members) {
        barrier.arrived = 0;
        ++barrier.round;
    }
    // The last to come waits too, so that the order in which threads go on does not depend on who came last. In case
    // of trouble nobody goes on.
    swapcontext(&fibres[fibre].context, &scheduler);
    waits_at[number] = nullptr;
    become(number);
}

inline void run_block() {
#ifndef __SANITIZE_ADDRESS__
    if (__start_shared_memory) memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
#endif
    begun = ended = 0;
    whole = {count, 0, 0, 0};
    for (int warp = 0; warp * WARP < count; ++warp)
        warps[warp] = {count - warp * WARP < WARP ? count - warp * WARP : WARP, 0, 0, 0};
    while (begun < count && !*trouble) start_fibre();
    while (ended < count && !*trouble) {
        bool progress = false;
        for (int n = 0; n < count && !*trouble; ++n) {
            const int number = nth(n, count);
            const Barrier* barrier = waits_at[number];
            if (barrier && barrier->round != round_of[number]) {
                progress = true;
                resume(fibre_of[number]);
            }
        }
        if (!progress && !*trouble)
            snprintf(trouble, sizeof trouble, "some threads wait for others that wait elsewhere");
    }
}

inline const char* run(void (*f)(void**), dim3 grid, dim3 shape, int descending, void** arguments) {
    kernel = f;
    parameters = arguments;
    blocks = grid;
    threads = shape;
    backward = descending;
    count = shape.x * shape.y * shape.z;
    *trouble = 0;
    made = idles = 0;  // fibres that an earlier launch left waiting start anew
    memset(waits_at, 0, sizeof waits_at);
    if (count < 1 || count > MOST_THREADS) return "a block has 1 to 1024 threads";
    const int all = grid.x * grid.y * grid.z;
    for (int n = 0; n < all && !*trouble; ++n) {
        const int number = nth(n, all);
        block = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
        run_block();
    }
    return trouble;
}

// Turns a kernel of any signature into one that reads its parameters from an array of pointers, as CUDA's launch
// does, and tells their sizes.
template <int... I> struct Indices {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> { typedef Indices<I...> type; };
template <class T> struct Value { typedef T type; };
template <class T> struct Value<T&> { typedef T type; };

template <class F, F f> struct Launch;
template <class... A, void (*f)(A...)> struct Launch<void (*)(A...), f> {
    template <int... I> static void call(void** p, Indices<I...>) { f(*(typename Value<A>::type*)p[I]...); }
    static void read(void** p) { call(p, typename Count<sizeof...(A)>::type()); }
    static int sizes(int* to) {
        const int bytes[] = {(int)sizeof(A)..., 0};
        memcpy(to, bytes, sizeof(int) * sizeof...(A));
        return sizeof...(A);
    }
};

template <class T> T exchange(T value, int lane, int line) {
    static_assert(sizeof(T) <= sizeof exchanged[0], "too large to be exchanged");
    const int first = me / WARP * WARP;
    memcpy(exchanged[me], &value, sizeof value);
    wait(warps[me / WARP], line);
    if (first + lane < count) memcpy(&value, exchanged[first + lane], sizeof value);
    wait(warps[me / WARP], line);
    return value;
}

inline unsigned vote(bool mine, int line) {
    unsigned mask = 0;
    const int first = me / WARP * WARP;
    exchanged[me][0] = mine;
    wait(warps[me / WARP], line);
    for (int lane = 0; lane < WARP && first + lane < count; ++lane) mask |= (exchanged[first + lane][0] & 1u) << lane;
    wait(warps[me / WARP], line);
    return mask;
}

}  // namespace host

#define HOST_EXPORT extern "C" __attribute__((visibility("default")))
#define HOST_KERNEL(NAME) \
    HOST_EXPORT const char* NAME##_run(const unsigned* shape, int descending, void** arguments) { \
        return host::run(host::Launch<decltype(&NAME), &NAME>::read, {shape[0], shape[1], shape[2]}, \
                         {shape[3], shape[4], shape[5]}, descending, arguments); \
    } \
    HOST_EXPORT int NAME##_sizes(int* to) { return host::Launch<decltype(&NAME), &NAME>::sizes(to); }

// --- built-in variables and functions

#define threadIdx host::thread
#define blockIdx host::block
#define blockDim host::threads
#define gridDim host::blocks
#define warpSize 32

#define __syncthreads() host::wait(host::whole, __LINE__)
#define __syncwarp(...) host::wait(host::warps[host::me / 32], __LINE__)
#define __shfl_sync(mask, value, lane) host::exchange(value, (lane) & 31, __LINE__)
#define __shfl_xor_sync(mask, value, other) host::exchange(value, (host::me % 32) ^ (other), __LINE__)
#define __shfl_down_sync(mask, value, by) \
    host::exchange(value, host::me % 32 + (by) < 32 ? host::me % 32 + (by) : host::me % 32, __LINE__)
#define __ballot_sync(mask, value) host::vote(value, __LINE__)
#define __any_sync(mask, value) (host::vote(value, __LINE__) != 0)

inline void __threadfence() {}

#define __builtin_assume(condition)  // a promise to the optimizer, made of __isGlobal and the like
inline bool __isGlobal(const void*) { return true; }

template <class T> T host_replace(T* at, T value) { T old = *at; *at = value; return old; }
#define atomicAdd(at, value) host_replace(at, (__typeof__(*(at)))(*(at) + (value)))
#define atomicExch(at, value) host_replace(at, (__typeof__(*(at)))(value))
#define atomicOr(at, value) host_replace(at, (__typeof__(*(at)))(*(at) | (value)))
#define atomicMin(at, value) host_replace(at, (__typeof__(*(at)))(*(at) < (value) ? *(at) : (value)))
#define atomicMax(at, value) host_replace(at, (__typeof__(*(at)))(*(at) > (value) ? *(at) : (value)))

inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }

template <class To, class From> To host_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "another size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(unsigned x) { return host_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return host_bits<unsigned>(x); }
inline float __int_as_float(int x) { return host_bits<float>(x); }
inline int __float_as_int(float x) { return host_bits<int>(x); }
inline double __longlong_as_double(long long x) { return host_bits<double>(x); }
inline long long __double_as_longlong(double x) { return host_bits<long long>(x); }

// The conversions that a kernel's text makes with an instruction of the GPU's, and therefore leaves out where
// __CUDACC__ is not defined.

inline float half_to_float(unsigned short half) {
    const unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ffu;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = fraction * 0x1p-24f;
    return sign ? -small : small;
}

inline unsigned short float_to_half(float x) {
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return sign | 0x7e00u;
    if (size >= 0x477ff000u) return sign | 0x7c00u;  // from 65520 on it is infinity
    if (size < 0x38800000u)  // subnormal: the sum with 0.5 is rounded to multiples of 2**-24, as it has to be
        return sign | (__float_as_uint(__uint_as_float(size) + 0.5f) - 0x3f000000u);
    return sign | (size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13;
}
