/* "text" (or "base64") as a QR code (ISO/IEC 18004): the smallest of versions 1 to 40 that holds its bytes with "correction" L, M, Q or
 * H (7, 15, 25, 30 % of the code may be lost; default M). Gives "rows", texts of 1 (dark) and 0 without the quiet zone, "size",
 * "version", "mask", and with "svg" a picture with a quiet zone of four. The mask is the one of least penalty, as the standard has it. */
#include "cargo.h"

#define SIDE_MAX 177
#define CODEWORDS_MAX 3706

/* By correction L, M, Q, H and version: codewords of correction in a block, and blocks (table 9 of the standard). */
static const uint8_t check_words[4][41] = {
    {0, 7, 10, 15, 20, 26, 18, 20, 24, 30, 18, 20, 24, 26, 30, 22, 24, 28, 30, 28, 28,
     28, 28, 30, 30, 26, 28, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30},
    {0, 10, 16, 26, 18, 24, 16, 18, 22, 22, 26, 30, 22, 22, 24, 24, 28, 28, 26, 26, 26,
     26, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28},
    {0, 13, 22, 18, 26, 18, 24, 18, 22, 20, 24, 28, 26, 24, 20, 30, 24, 28, 28, 26, 30,
     28, 30, 30, 30, 30, 28, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30},
    {0, 17, 28, 22, 16, 22, 28, 26, 26, 24, 28, 24, 28, 22, 24, 24, 30, 28, 28, 26, 28,
     30, 24, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30, 30}};
static const uint8_t blocks[4][41] = {
    {0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4, 4, 6, 6, 6, 6, 7, 8,
     8, 9, 9, 10, 12, 12, 12, 13, 14, 15, 16, 17, 18, 19, 19, 20, 21, 22, 24, 25},
    {0, 1, 1, 1, 2, 2, 4, 4, 4, 5, 5, 5, 8, 9, 9, 10, 10, 11, 13, 14, 16,
     17, 17, 18, 20, 21, 23, 25, 26, 28, 29, 31, 33, 35, 37, 38, 40, 43, 45, 47, 49},
    {0, 1, 1, 2, 2, 4, 4, 6, 6, 8, 8, 8, 10, 12, 16, 12, 17, 16, 18, 21, 20,
     23, 23, 25, 27, 29, 34, 34, 35, 38, 40, 43, 45, 48, 51, 53, 56, 59, 62, 65, 68},
    {0, 1, 1, 2, 4, 4, 4, 5, 6, 8, 8, 11, 11, 16, 16, 18, 16, 19, 21, 25, 25,
     25, 34, 30, 32, 35, 37, 40, 42, 45, 48, 51, 54, 57, 60, 63, 66, 70, 74, 77, 81}};

static int level, version, side;
static uint8_t dark[SIDE_MAX][SIDE_MAX], fixed[SIDE_MAX][SIDE_MAX];
static uint8_t words[CODEWORDS_MAX], placed[CODEWORDS_MAX];

/* Modules that are neither pattern nor information, in bits. */
static int raw_bits(int v) {
    int bits = (16 * v + 128) * v + 64;
    if (v >= 2) {
        int aligned = v / 7 + 2;
        bits -= (25 * aligned - 10) * aligned - 55;
        if (v >= 7) bits -= 36;
    }
    return bits;
}

static int data_words(int v) { return raw_bits(v) / 8 - check_words[level][v] * blocks[level][v]; }

static int count_bits(int v) { return v < 10 ? 8 : 16; }

/* Reed and Solomon, over GF(256) modulo x^8 + x^4 + x^3 + x^2 + 1. */
static uint8_t times(uint8_t x, uint8_t y) {
    int z = 0;
    for (int i = 7; i >= 0; i--) {
        z = z << 1 ^ (z >> 7) * 0x11D;
        z ^= (y >> i & 1) * x;
    }
    return (uint8_t)z;
}

static void divisor_of(int degree, uint8_t *divisor) {
    memset(divisor, 0, (size_t)degree);
    divisor[degree - 1] = 1;
    uint8_t root = 1;
    for (int i = 0; i < degree; i++) {
        for (int j = 0; j < degree; j++) {
            divisor[j] = times(divisor[j], root);
            if (j + 1 < degree) divisor[j] ^= divisor[j + 1];
        }
        root = times(root, 2);
    }
}

static void remainder_of(const uint8_t *data, int size, const uint8_t *divisor, int degree, uint8_t *rest) {
    memset(rest, 0, (size_t)degree);
    for (int i = 0; i < size; i++) {
        uint8_t factor = data[i] ^ rest[0];
        memmove(rest, rest + 1, (size_t)degree - 1);
        rest[degree - 1] = 0;
        for (int j = 0; j < degree; j++) rest[j] ^= times(divisor[j], factor);
    }
}

static int bit_count;

static void put_bits(int value, int count) {
    for (int i = count - 1; i >= 0; i--, bit_count++) words[bit_count / 8] |= (uint8_t)((value >> i & 1) << (7 - bit_count % 8));
}

/* The bytes as codewords: mode, count, data, terminator, and padding. */
static void encode(const Buf *data) {
    for (version = 1; version <= 40; version++)
        if (4 + count_bits(version) + 8 * (int64_t)data->size <= 8 * data_words(version)) break;
    if (version > 40) fail("the text is too long for a QR code of this correction");
    put_bits(4, 4);
    put_bits((int)data->size, count_bits(version));
    for (size_t i = 0; i < data->size; i++) put_bits((uint8_t)data->at[i], 8);
    int room = 8 * data_words(version);
    put_bits(0, room - bit_count < 4 ? room - bit_count : 4);
    put_bits(0, -bit_count & 7);
    for (int pad = 0xEC; bit_count < room; pad ^= 0xEC ^ 0x11) put_bits(pad, 8);
}

/* Blocks with their correction, interleaved; the first blocks are one codeword shorter where they are not all the same. */
static int interleave(void) {
    int count = blocks[level][version], checks = check_words[level][version], total = raw_bits(version) / 8;
    int shorter = count - total % count, size = total / count - checks, from = 0;
    uint8_t divisor[30], rest[81][30];
    const uint8_t *block[81];
    divisor_of(checks, divisor);
    for (int i = 0; i < count; i++) {
        int own = size + (i >= shorter);
        block[i] = words + from;
        remainder_of(block[i], own, divisor, checks, rest[i]);
        from += own;
    }
    int to = 0;
    for (int k = 0; k <= size; k++)
        for (int i = 0; i < count; i++)
            if (k < size || i >= shorter) placed[to++] = block[i][k];
    for (int k = 0; k < checks; k++)
        for (int i = 0; i < count; i++) placed[to++] = rest[i][k];
    return to;
}

static void set(int x, int y, bool is_dark) {
    dark[y][x] = is_dark;
    fixed[y][x] = 1;
}

static int larger(int a, int b) { return a > b ? a : b; }

static void draw_finder(int x, int y) {
    for (int dy = -4; dy <= 4; dy++)
        for (int dx = -4; dx <= 4; dx++) {
            int ring = larger(abs(dx), abs(dy)), at_x = x + dx, at_y = y + dy;
            if (at_x >= 0 && at_x < side && at_y >= 0 && at_y < side) set(at_x, at_y, ring != 2 && ring != 4);
        }
}

static void draw_alignments(void) {
    int count = version / 7 + 2, places[7] = {6}, step = version == 32 ? 26 : (version * 4 + count * 2 + 1) / (count * 2 - 2) * 2;
    if (version == 1) return;
    for (int i = count - 1, place = side - 7; i >= 1; i--, place -= step) places[i] = place;
    for (int i = 0; i < count; i++)
        for (int j = 0; j < count; j++) {
            if ((i == 0 && j == 0) || (i == 0 && j == count - 1) || (i == count - 1 && j == 0)) continue; /* the finders */
            for (int dy = -2; dy <= 2; dy++)
                for (int dx = -2; dx <= 2; dx++) set(places[i] + dx, places[j] + dy, larger(abs(dx), abs(dy)) != 1);
        }
}

/* 15 bits: correction and mask, a BCH code, and 0x5412 so that they are never all light. */
static void draw_format(int mask) {
    static const int codes[] = {1, 0, 3, 2};
    int data = codes[level] << 3 | mask, rest = data;
    for (int i = 0; i < 10; i++) rest = rest << 1 ^ (rest >> 9) * 0x537;
    int bits = (data << 10 | rest) ^ 0x5412;
    for (int i = 0; i < 6; i++) set(8, i, bits >> i & 1);
    set(8, 7, bits >> 6 & 1);
    set(8, 8, bits >> 7 & 1);
    set(7, 8, bits >> 8 & 1);
    for (int i = 9; i < 15; i++) set(14 - i, 8, bits >> i & 1);
    for (int i = 0; i < 8; i++) set(side - 1 - i, 8, bits >> i & 1);
    for (int i = 8; i < 15; i++) set(8, side - 15 + i, bits >> i & 1);
    set(8, side - 8, true);
}

static void draw_version(void) {
    int rest = version;
    if (version < 7) return;
    for (int i = 0; i < 12; i++) rest = rest << 1 ^ (rest >> 11) * 0x1F25;
    int bits = version << 12 | rest;
    for (int i = 0; i < 18; i++) {
        set(side - 11 + i % 3, i / 3, bits >> i & 1);
        set(i / 3, side - 11 + i % 3, bits >> i & 1);
    }
}

/* Codewords go up and down in columns of two, from the right; column 6 belongs to the timing pattern. */
static void draw_words(int count) {
    int i = 0;
    for (int right = side - 1; right >= 1; right -= 2) {
        if (right == 6) right = 5;
        bool upwards = ((right + 1) & 2) == 0;
        for (int vertical = 0; vertical < side; vertical++)
            for (int j = 0; j < 2; j++) {
                int x = right - j, y = upwards ? side - 1 - vertical : vertical;
                if (!fixed[y][x] && i < 8 * count) {
                    dark[y][x] = placed[i / 8] >> (7 - i % 8) & 1;
                    i++;
                }
            }
    }
}

static bool is_masked(int mask, int x, int y) {
    switch (mask) {
    case 0: return (x + y) % 2 == 0;
    case 1: return y % 2 == 0;
    case 2: return x % 3 == 0;
    case 3: return (x + y) % 3 == 0;
    case 4: return (x / 3 + y / 2) % 2 == 0;
    case 5: return x * y % 2 + x * y % 3 == 0;
    case 6: return (x * y % 2 + x * y % 3) % 2 == 0;
    default: return ((x + y) % 2 + x * y % 3) % 2 == 0;
    }
}

static void apply_mask(int mask) {
    for (int y = 0; y < side; y++)
        for (int x = 0; x < side; x++) dark[y][x] ^= !fixed[y][x] && is_masked(mask, x, y);
}

/* Along one line: runs of five and more, and what looks like a finder with four light modules at one side. */
static int line_penalty(int line, bool is_row) {
    static const uint8_t finder[] = {1, 0, 1, 1, 1, 0, 1};
    uint8_t m[SIDE_MAX];
    int penalty = 0, run = 0;
    for (int i = 0; i < side; i++) {
        m[i] = is_row ? dark[line][i] : dark[i][line];
        run = i && m[i] == m[i - 1] ? run + 1 : 1;
        penalty += run == 5 ? 3 : run > 5;
    }
    for (int i = 0; i + 7 <= side; i++) {
        if (memcmp(m + i, finder, 7)) continue;
        bool before = true, after = true;
        for (int k = 1; k <= 4; k++) {
            before = before && (i - k < 0 || !m[i - k]);
            after = after && (i + 6 + k >= side || !m[i + 6 + k]);
        }
        penalty += 40 * (before || after);
    }
    return penalty;
}

static int penalty_of(void) {
    int penalty = 0, darks = 0;
    for (int i = 0; i < side; i++) penalty += line_penalty(i, true) + line_penalty(i, false);
    for (int y = 0; y < side; y++)
        for (int x = 0; x < side; x++) {
            darks += dark[y][x];
            if (x + 1 == side || y + 1 == side) continue;
            int sum = dark[y][x] + dark[y][x + 1] + dark[y + 1][x] + dark[y + 1][x + 1];
            penalty += 3 * (sum == 0 || sum == 4);
        }
    return penalty + 10 * (abs(darks * 20 - side * side * 10) / (side * side)); /* each 5 % away from a half */
}

static int draw(int count) {
    side = 17 + 4 * version;
    for (int i = 0; i < side; i++) {
        set(6, i, i % 2 == 0);
        set(i, 6, i % 2 == 0);
    }
    draw_finder(3, 3);
    draw_finder(side - 4, 3);
    draw_finder(3, side - 4);
    draw_alignments();
    draw_format(0);
    draw_version();
    draw_words(count);
    int best = 0, least = INT32_MAX;
    for (int mask = 0; mask < 8; mask++) {
        apply_mask(mask);
        draw_format(mask);
        int penalty = penalty_of();
        if (penalty < least) {
            least = penalty;
            best = mask;
        }
        apply_mask(mask);
    }
    apply_mask(best);
    draw_format(best);
    return best;
}

static void put_svg(Buf *b) {
    put_text(b, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 ");
    put_int(b, side + 8);
    put_char(b, ' ');
    put_int(b, side + 8);
    put_text(b, "\" shape-rendering=\"crispEdges\"><path fill=\"#fff\" d=\"M0 0h");
    put_int(b, side + 8);
    put_char(b, 'v');
    put_int(b, side + 8);
    put_text(b, "H0z\"/><path d=\"");
    for (int y = 0; y < side; y++)
        for (int x = 0, run; x < side; x += run) {
            for (run = 1; x + run < side && dark[y][x + run] == dark[y][x];) run++;
            if (!dark[y][x]) continue;
            put_char(b, 'M');
            put_int(b, x + 4);
            put_char(b, ' ');
            put_int(b, y + 4);
            put_char(b, 'h');
            put_int(b, run);
            put_text(b, "v1h-");
            put_int(b, run);
            put_char(b, 'z');
        }
    put_text(b, "\"/></svg>");
}

int main(void) {
    static const char levels[] = "LMQH";
    const Json *in = input();
    Buf data = input_bytes(in);
    const char *correction = string_or(in, "correction", "M"), *found = strchr(levels, *correction);
    if (strlen(correction) != 1 || !found) bad_field("correction", "L, M, Q or H");
    bool with_svg = bool_or(in, "svg", false);
    level = (int)(found - levels);
    encode(&data);
    int mask = draw(interleave());
    Buf out = done_begin();
    done_int(&out, "size", side);
    done_int(&out, "version", version);
    done_int(&out, "mask", mask);
    done_key(&out, "rows");
    for (int y = 0; y < side; y++) {
        put_text(&out, y ? ",\"" : "[\"");
        for (int x = 0; x < side; x++) put_char(&out, '0' + (char)dark[y][x]);
        put_char(&out, '"');
    }
    put_char(&out, ']');
    if (with_svg) {
        Buf svg = {0};
        put_svg(&svg);
        done_string(&out, "svg", svg.at, svg.size);
    }
    return done_end(&out);
}
