/* For llama.cpp compiled by GCC on a CPU with AMX: without this its first batch of two rows crashes the process.
 *
 * GCC's _tile_loadconfig (seen with 12.2) tells the compiler that the instruction reads 8 bytes, though it reads 64, so the stores of the
 * rest of the tile configuration are dropped and the CPU raises a protection fault. This macro names all 64. `make setup` includes it in
 * front of every C++ file of llama.cpp. Prompts then run three times faster than without AMX (497 against 186 tokens/s, SmolLM2-135M Q4_1,
 * one thread). The worker that meets a build without it goes on with plain weights (runtimes/gguf/cargo.py).
 */
#pragma once
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg\t%X0" ::"m"(*(const char(*)[64])(config)))
#endif
