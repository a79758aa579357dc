/* Numbers with a point: read as JSON has them, written as short as they can be read back. Those that are no numbers or infinite end the
 * program with an error line. */
#ifndef NUMBER_H
#define NUMBER_H

#include <math.h>
#include <stdio.h>

#include "cargo.h"

static inline bool json_digits(const char **at, const char *end) {
    const char *first = *at;
    while (*at < end && **at >= '0' && **at <= '9') ++*at;
    return *at > first;
}

/* Whether the text is a number as RFC 8259 has it: no leading zeros, no lone point or sign. */
static bool is_json_number(const char *text, size_t size) {
    const char *at = text, *end = text + size;
    if (at < end && *at == '-') at++;
    const char *whole = at;
    if (!json_digits(&at, end) || (*whole == '0' && at > whole + 1)) return false;
    if (at < end && *at == '.' && (at++, !json_digits(&at, end))) return false;
    if (at < end && (*at | 32) == 'e') {
        at++;
        if (at < end && (*at == '+' || *at == '-')) at++;
        if (!json_digits(&at, end)) return false;
    }
    return at == end;
}

/* The value of a JSON number; "name" is the field that an error names, "must" what it must be. */
static double number_of(const Json *value, const char *name, const char *must) {
    char text[64];
    bool is_good = value && value->kind == JSON_NUMBER && value->size < sizeof text && is_json_number(value->text, value->size);
    if (!is_good) bad_field(name, must);
    memcpy(text, value->text, value->size);
    text[value->size] = 0;
    double number = strtod(text, NULL);
    if (!isfinite(number)) bad_field(name, must);
    return number;
}

static inline double need_number(const Json *in, const char *name, double low, double high, const char *must) {
    double number = number_of(field(in, name), name, must);
    if (number < low || number > high) bad_field(name, must);
    return number;
}

/* The shortest of 1 to 17 digits that reads back as the same number; whole ones up to 2^53 without a point. */
static inline void put_number(Buf *b, double value) {
    char text[40];
    if (!isfinite(value)) fail("the result is too large");
    if (value == floor(value) && fabs(value) <= 9007199254740992.0) {
        put_int(b, (int64_t)value);
        return;
    }
    for (int digits = 1; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value) break;
    }
    put_text(b, text);
}
static inline void done_number(Buf *b, const char *key, double value) {
    done_key(b, key);
    put_number(b, value);
}

typedef struct {
    double *at;
    size_t size;
} Numbers;

/* An array of numbers. */
static inline Numbers numbers_of(const Json *array, const char *name, const char *must) {
    if (!array || array->kind != JSON_ARRAY) bad_field(name, must);
    Numbers numbers = {need(array->size * sizeof(double)), 0};
    for (const Json *child = array->first; child; child = child->next) numbers.at[numbers.size++] = number_of(child, name, must);
    return numbers;
}

#endif
