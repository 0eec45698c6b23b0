// Which instruction sets there are here, and the kernels of each.

#pragma once

#include <cstring>

#include "kernels.h"
#include "portable.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c,fma,bmi2")))
#define AVX512_NAMESPACE vnni
#define NAME "vnni"
#define DOT(sums, codes, x) sums = _mm512_dpbusd_epi32(sums, codes, x)
#include "avx512.h"
#undef TARGET
#undef AVX512_NAMESPACE
#undef NAME
#undef DOT

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,fma,bmi2")))
#define AVX512_NAMESPACE avx512
#define NAME "avx512"
// Codes are below 128, so that no pair of products leaves 16 bits.
#define DOT(sums, codes, x) \
    sums = _mm512_add_epi32( \
        sums, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), _mm512_set1_epi16(1)))
#include "avx512.h"
#undef TARGET
#undef AVX512_NAMESPACE
#undef NAME
#undef DOT

#include "amx.h"
#include "avx2.h"
#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#include "neon.h"
#endif

namespace deltamux {

struct Choice {
    const Kernels *kernels;
    bool (*runs_here)();
};

inline bool always() { return true; }

#if defined(__x86_64__)
inline bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

inline bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}

inline bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

// The processor's tiles, and Linux's leave to use them.
inline bool has_amx() {
#if defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    constexpr unsigned TILE = 1u << 24, INT8 = 1u << 25;
    unsigned a, b, c, d = 0;
    if (!has_vnni() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if ((d & TILE) == 0 || (d & INT8) == 0) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

#if defined(__aarch64__)
inline bool has_neon() {
#if defined(__linux__)
    constexpr unsigned long DOT_PRODUCTS = 1ul << 20;  // HWCAP_ASIMDDP
    return getauxval(AT_HWCAP) & DOT_PRODUCTS;
#else
    return true;
#endif
}
#endif

// Fastest first.
inline const Choice CHOICES[] = {
#if defined(__x86_64__)
    {&amx::KERNELS, has_amx},
    {&vnni::KERNELS, has_vnni},
    {&avx512::KERNELS, has_avx512},
    {&avx2::KERNELS, has_avx2},

#elif defined(__aarch64__)
    {&neon::KERNELS, has_neon},
#endif
    {&portable::KERNELS, always},
};

// The kernels of that name, or the fastest where it is empty; none if there are none here.
inline const Kernels *find_kernels(const char *name) {
    for (const Choice &choice : CHOICES) {
        bool wanted = !*name || !std::strcmp(choice.kernels->name, name);
        if (wanted && choice.runs_here()) return choice.kernels;
    }
    return nullptr;
}

}  // namespace deltamux
