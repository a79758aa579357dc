/* SHA-256 (FIPS 180-4) of "text" or "base64". */
#include "cargo.h"

static uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
static uint32_t constants[64];

static uint32_t turn(uint32_t x, int n) { return x >> n | x << (32 - n); }

/* The first 32 bits of the fractional part of the cube root of p: floor(cbrt(p) * 2^32) without its whole part. */
static uint32_t cube_root_bits(uint32_t p) {
    unsigned __int128 cube = (unsigned __int128)p << 96;
    uint64_t root = 0;
    for (int bit = 35; bit >= 0; bit--) {
        uint64_t next = root | 1ULL << bit;
        if ((unsigned __int128)next * next * next <= cube) root = next;
    }
    return (uint32_t)root;
}

static void make_constants(void) {
    int count = 0;
    for (uint32_t n = 2; count < 64; n++) {
        bool prime = true;
        for (uint32_t d = 2; d * d <= n; d++) prime &= n % d != 0;
        if (prime) constants[count++] = cube_root_bits(n);
    }
}

static void block(const uint8_t *p) {
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++) w[i] = (uint32_t)p[4 * i] << 24 | p[4 * i + 1] << 16 | p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++) {
        uint32_t a = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3;
        uint32_t b = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10;
        w[i] = w[i - 16] + a + w[i - 7] + b;
    }
    memcpy(s, state, sizeof s);
    for (int i = 0; i < 64; i++) {
        uint32_t e = turn(s[4], 6) ^ turn(s[4], 11) ^ turn(s[4], 25);
        uint32_t t1 = s[7] + e + ((s[4] & s[5]) ^ (~s[4] & s[6])) + constants[i] + w[i];
        uint32_t a = turn(s[0], 2) ^ turn(s[0], 13) ^ turn(s[0], 22);
        uint32_t t2 = a + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += t1;
        s[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) state[i] += s[i];
}

int main(void) {
    Buf data = input_bytes(input());
    make_constants();
    size_t at = 0;
    for (; at + 64 <= data.size; at += 64) block((uint8_t *)data.at + at);
    uint8_t last[128] = {0}, digest[32];
    size_t rest = data.size - at, total = rest < 56 ? 64 : 128;
    if (rest) memcpy(last, data.at + at, rest);
    last[rest] = 0x80;
    for (int i = 0; i < 8; i++) last[total - 1 - i] = (uint8_t)((uint64_t)data.size * 8 >> 8 * i);
    for (size_t i = 0; i < total; i += 64) block(last + i);
    for (int i = 0; i < 32; i++) digest[i] = (uint8_t)(state[i / 4] >> (24 - 8 * (i % 4)));
    Buf hex = {0}, out = done_begin();
    put_hex(&hex, digest, 32);
    done_string(&out, "sha256", hex.at, hex.size);
    done_int(&out, "bytes", (int64_t)data.size);
    return done_end(&out);
}
