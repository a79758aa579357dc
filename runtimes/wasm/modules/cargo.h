/* What every module here shares: stdin as one JSON object, stdout as JSON lines, buffers that grow. Nothing is ever freed: a run is short
 * and its memory goes with it. Where the input is wrong, fail() says so in an error line and ends the program. */
#ifndef CARGO_H
#define CARGO_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DEPTH_MAX 200

/* Bytes */

typedef struct {
    char *at;
    size_t size, room;
} Buf;

static void fail(const char *message);

static void *need(size_t size) {
    void *memory = malloc(size ? size : 1);
    if (!memory) fail("the job needs more memory than there is");
    return memory;
}

static char *buf_grow(Buf *b, size_t more) {
    if (b->room - b->size < more) {
        size_t room = b->room ? 2 * b->room : 256;
        while (room - b->size < more) room *= 2;
        char *at = realloc(b->at, room);
        if (!at) fail("the job needs more memory than there is");
        b->at = at;
        b->room = room;
    }
    b->size += more;
    return b->at + b->size - more;
}

static inline void put(Buf *b, const char *data, size_t size) {
    if (size) memcpy(buf_grow(b, size), data, size);
}
static inline void put_char(Buf *b, char c) { *buf_grow(b, 1) = c; }
static inline void put_text(Buf *b, const char *text) { put(b, text, strlen(text)); }

static inline void put_int(Buf *b, int64_t value) {
    char digits[24];
    int at = sizeof digits;
    uint64_t rest = value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
    do digits[--at] = '0' + rest % 10; while (rest /= 10);
    if (value < 0) digits[--at] = '-';
    put(b, digits + at, sizeof digits - at);
}

/* thousandths of a unit, as 1.25 or 3 */
static inline void put_thousandths(Buf *b, int64_t value) {
    put_int(b, value / 1000);
    int rest = (int)(value % 1000);
    if (!rest) return;
    char digits[4] = {'.', '0' + rest / 100, '0' + rest / 10 % 10, '0' + rest % 10};
    int size = 4;
    while (digits[size - 1] == '0') size--;
    put(b, digits, size);
}

static void put_string(Buf *b, const char *text, size_t size) {
    put_char(b, '"');
    for (size_t i = 0; i < size; i++) {
        unsigned char c = text[i];
        if (c == '"' || c == '\\') {
            put_char(b, '\\');
            put_char(b, c);
        } else if (c == '\n') {
            put_text(b, "\\n");
        } else if (c == '\t') {
            put_text(b, "\\t");
        } else if (c < 32) {
            put_text(b, "\\u00");
            put_char(b, "0123456789abcdef"[c >> 4]);
            put_char(b, "0123456789abcdef"[c & 15]);
        } else {
            put_char(b, c);
        }
    }
    put_char(b, '"');
}

static inline void put_hex(Buf *b, const uint8_t *data, size_t size) {
    for (size_t i = 0; i < size; i++) {
        put_char(b, "0123456789abcdef"[data[i] >> 4]);
        put_char(b, "0123456789abcdef"[data[i] & 15]);
    }
}

static void send(const Buf *b) {
    for (size_t done = 0; done < b->size;) {
        ssize_t size = write(1, b->at + done, b->size - done);
        if (size <= 0) exit(2);
        done += size;
    }
}

static void fail(const char *message) {
    Buf line = {0};
    put_text(&line, "{\"type\":\"error\",\"message\":");
    put_string(&line, message, strlen(message));
    put_text(&line, "}\n");
    send(&line);
    exit(1);
}

/* The done line: done_begin(), done_key(), a value, …, done_end(). */

static inline Buf done_begin(void) {
    Buf b = {0};
    put_text(&b, "{\"type\":\"done\"");
    return b;
}
static inline void done_key(Buf *b, const char *key) {
    put_char(b, ',');
    put_string(b, key, strlen(key));
    put_char(b, ':');
}
static inline void done_string(Buf *b, const char *key, const char *text, size_t size) {
    done_key(b, key);
    put_string(b, text, size);
}
static inline void done_int(Buf *b, const char *key, int64_t value) {
    done_key(b, key);
    put_int(b, value);
}
static inline void done_bool(Buf *b, const char *key, bool value) {
    done_key(b, key);
    put_text(b, value ? "true" : "false");
}
static inline int done_end(Buf *b) {
    put_text(b, "}\n");
    send(b);
    return 0;
}

/* JSON. Numbers keep their text; a string's text is decoded. Members of an object and entries of an array are a list by next. */

typedef enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } Kind;

typedef struct Json {
    Kind kind;
    const char *text, *key;
    size_t size, key_size;
    struct Json *first, *next;
} Json;

typedef struct {
    const char *at, *end;
} Scan;

static inline void json_bad(void) { fail("the input is not JSON"); }

static inline void json_space(Scan *s) {
    while (s->at < s->end && (*s->at == ' ' || *s->at == '\n' || *s->at == '\t' || *s->at == '\r')) s->at++;
}

static int json_hex4(Scan *s) {
    if (s->end - s->at < 4) json_bad();
    int value = 0;
    for (int i = 0; i < 4; i++) {
        char c = *s->at++;
        int digit = c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
        if (digit < 0) json_bad();
        value = value << 4 | digit;
    }
    return value;
}

static inline void put_utf8(Buf *b, uint32_t c) {
    if (c < 0x80) {
        put_char(b, (char)c);
    } else if (c < 0x800) {
        put_char(b, (char)(0xC0 | c >> 6));
        put_char(b, (char)(0x80 | (c & 63)));
    } else if (c < 0x10000) {
        put_char(b, (char)(0xE0 | c >> 12));
        put_char(b, (char)(0x80 | (c >> 6 & 63)));
        put_char(b, (char)(0x80 | (c & 63)));
    } else {
        put_char(b, (char)(0xF0 | c >> 18));
        put_char(b, (char)(0x80 | (c >> 12 & 63)));
        put_char(b, (char)(0x80 | (c >> 6 & 63)));
        put_char(b, (char)(0x80 | (c & 63)));
    }
}

static void json_unicode(Scan *s, Buf *b) {
    uint32_t c = (uint32_t)json_hex4(s);
    if (c >= 0xD800 && c < 0xDC00 && s->end - s->at >= 6 && s->at[0] == '\\' && s->at[1] == 'u') {
        Scan ahead = {s->at + 2, s->end};
        uint32_t low = (uint32_t)json_hex4(&ahead);
        if (low >= 0xDC00 && low < 0xE000) {
            c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
            s->at = ahead.at;
        }
    }
    put_utf8(b, c >= 0xD800 && c < 0xE000 ? 0xFFFD : c); /* half a pair is no character */
}

static void json_string(Scan *s, const char **text, size_t *size) {
    if (s->at == s->end || *s->at++ != '"') json_bad();
    Buf b = {0};
    while (s->at < s->end && *s->at != '"') {
        char c = *s->at++;
        if (c != '\\') {
            put_char(&b, c);
            continue;
        }
        if (s->at == s->end) json_bad();
        switch (c = *s->at++) {
        case 'n': put_char(&b, '\n'); break;
        case 't': put_char(&b, '\t'); break;
        case 'r': put_char(&b, '\r'); break;
        case 'b': put_char(&b, '\b'); break;
        case 'f': put_char(&b, '\f'); break;
        case 'u': json_unicode(s, &b); break;
        case '"': case '\\': case '/': put_char(&b, c); break;
        default: json_bad();
        }
    }
    if (s->at++ >= s->end) json_bad();
    put_char(&b, 0); /* so that C functions may read it */
    *text = b.at;
    *size = b.size - 1;
}

static bool json_word(Scan *s, const char *word) {
    size_t size = strlen(word);
    if ((size_t)(s->end - s->at) < size || memcmp(s->at, word, size)) return false;
    s->at += size;
    return true;
}

static Json *json_value(Scan *s, int depth);

static void json_members(Scan *s, Json *parent, char close, int depth) {
    Json **tail = &parent->first;
    s->at++;
    json_space(s);
    if (s->at < s->end && *s->at == close) {
        s->at++;
        return;
    }
    for (;;) {
        const char *key = NULL;
        size_t key_size = 0;
        json_space(s);
        if (parent->kind == JSON_OBJECT) {
            json_string(s, &key, &key_size);
            json_space(s);
            if (s->at == s->end || *s->at++ != ':') json_bad();
        }
        Json *child = json_value(s, depth + 1);
        child->key = key;
        child->key_size = key_size;
        *tail = child;
        tail = &child->next;
        parent->size++;
        json_space(s);
        if (s->at == s->end) json_bad();
        char c = *s->at++;
        if (c == close) return;
        if (c != ',') json_bad();
    }
}

static Json *json_value(Scan *s, int depth) {
    if (depth > DEPTH_MAX) fail("the input is nested too deeply");
    Json *value = need(sizeof *value);
    memset(value, 0, sizeof *value);
    json_space(s);
    if (s->at == s->end) json_bad();
    char c = *s->at;
    if (c == '{' || c == '[') {
        value->kind = c == '{' ? JSON_OBJECT : JSON_ARRAY;
        json_members(s, value, c == '{' ? '}' : ']', depth);
    } else if (c == '"') {
        value->kind = JSON_STRING;
        json_string(s, &value->text, &value->size);
    } else if (json_word(s, "true")) {
        value->kind = JSON_TRUE;
    } else if (json_word(s, "false")) {
        value->kind = JSON_FALSE;
    } else if (!json_word(s, "null")) {
        value->kind = JSON_NUMBER;
        value->text = s->at;
        while (s->at < s->end && memchr("+-.0123456789eE", *s->at, 15)) s->at++;
        value->size = s->at - value->text;
        if (!value->size) json_bad();
    }
    return value;
}

static Json *json_parse(const char *text, size_t size) {
    Scan s = {text, text + size};
    Json *value = json_value(&s, 0);
    json_space(&s);
    if (s.at != s.end) json_bad();
    return value;
}

static void put_json(Buf *b, const Json *value) {
    static const char *const words[] = {"null", "false", "true"};
    if (value->kind <= JSON_TRUE) {
        put_text(b, words[value->kind]);
    } else if (value->kind == JSON_NUMBER) {
        put(b, value->text, value->size);
    } else if (value->kind == JSON_STRING) {
        put_string(b, value->text, value->size);
    } else {
        put_char(b, value->kind == JSON_OBJECT ? '{' : '[');
        for (const Json *child = value->first; child; child = child->next) {
            if (child != value->first) put_char(b, ',');
            if (value->kind == JSON_OBJECT) {
                put_string(b, child->key, child->key_size);
                put_char(b, ':');
            }
            put_json(b, child);
        }
        put_char(b, value->kind == JSON_OBJECT ? '}' : ']');
    }
}

/* The member of this name, the last where there are several; NULL where there is none. */
static const Json *json_get(const Json *object, const char *name, size_t size) {
    const Json *found = NULL;
    if (object->kind != JSON_OBJECT) return NULL;
    for (const Json *child = object->first; child; child = child->next)
        if (child->key_size == size && !memcmp(child->key, name, size)) found = child;
    return found;
}

/* The input and its fields */

static const Json *input(void) {
    Buf b = {0};
    for (;;) {
        char *at = buf_grow(&b, 65536);
        ssize_t size = read(0, at, 65536);
        b.size -= 65536 - (size > 0 ? size : 0);
        if (size <= 0) break;
    }
    const Json *value = json_parse(b.at, b.size);
    if (value->kind != JSON_OBJECT) fail("the input is not a JSON object");
    return value;
}

static inline const Json *field(const Json *in, const char *name) {
    const Json *value = json_get(in, name, strlen(name));
    return value && value->kind != JSON_NULL ? value : NULL;
}

static void bad_field(const char *name, const char *must) {
    Buf b = {0};
    put_char(&b, '"');
    put_text(&b, name);
    put_text(&b, "\" must be ");
    put_text(&b, must);
    put_char(&b, 0);
    fail(b.at);
}

static inline const Json *need_string(const Json *in, const char *name) {
    const Json *value = field(in, name);
    if (!value || value->kind != JSON_STRING) bad_field(name, "a string");
    return value;
}

static inline const char *string_or(const Json *in, const char *name, const char *otherwise) {
    return field(in, name) ? need_string(in, name)->text : otherwise;
}

static inline int64_t int_or(const Json *in, const char *name, int64_t otherwise, int64_t low, int64_t high) {
    const Json *value = field(in, name);
    if (!value) return otherwise;
    bool good = value->kind == JSON_NUMBER && value->size < 18;
    int64_t number = 0;
    for (size_t i = 0; good && i < value->size; i++) {
        char c = value->text[i];
        if (c == '-' && i == 0) continue;
        good = c >= '0' && c <= '9';
        number = 10 * number + (c - '0');
    }
    if (good && value->text[0] == '-') number = -number;
    if (!good || number < low || number > high) {
        Buf b = {0};
        put_text(&b, "an integer between ");
        put_int(&b, low);
        put_text(&b, " and ");
        put_int(&b, high);
        put_char(&b, 0);
        bad_field(name, b.at);
    }
    return number;
}

static inline bool bool_or(const Json *in, const char *name, bool otherwise) {
    const Json *value = field(in, name);
    if (!value) return otherwise;
    if (value->kind != JSON_TRUE && value->kind != JSON_FALSE) bad_field(name, "true or false");
    return value->kind == JSON_TRUE;
}

/* Base64 */

static inline void put_base64(Buf *b, const uint8_t *data, size_t size) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < size; i += 3) {
        uint32_t v = data[i] << 16 | (i + 1 < size ? data[i + 1] << 8 : 0) | (i + 2 < size ? data[i + 2] : 0);
        char *at = buf_grow(b, 4);
        at[0] = digits[v >> 18];
        at[1] = digits[v >> 12 & 63];
        at[2] = i + 1 < size ? digits[v >> 6 & 63] : '=';
        at[3] = i + 2 < size ? digits[v & 63] : '=';
    }
}

static inline int base64_digit(char c) {
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    return c == '+' || c == '-' ? 62 : c == '/' || c == '_' ? 63 : -1;
}

/* Standard or URL alphabet; white space and padding are skipped. */
static inline Buf base64_decode(const char *text, size_t size) {
    Buf b = {0};
    uint32_t bits = 0;
    int count = 0;
    for (size_t i = 0; i < size; i++) {
        char c = text[i];
        if (c == '=' || c == '\n' || c == '\r' || c == ' ') continue;
        int digit = base64_digit(c);
        if (digit < 0) fail("the text is not base64");
        bits = bits << 6 | (uint32_t)digit;
        if ((count += 6) >= 8) put_char(&b, (char)(bits >> (count -= 8)));
    }
    return b;
}

/* The bytes that a job is about: "text" as it is, or "base64" decoded. */
static inline Buf input_bytes(const Json *in) {
    if (field(in, "base64")) {
        const Json *value = need_string(in, "base64");
        return base64_decode(value->text, value->size);
    }
    if (!field(in, "text")) fail("the input needs \"text\" or \"base64\"");
    const Json *value = need_string(in, "text");
    return (Buf){(char *)value->text, value->size, value->size};
}

/* Text: code points of UTF-8, and what is a letter or digit. Beyond ASCII every letter-like block counts as letters. */

static inline size_t utf8_length(const char *text, size_t size) {
    size_t count = 0;
    for (size_t i = 0; i < size; i++) count += (text[i] & 0xC0) != 0x80;
    return count;
}
static inline bool is_word_byte(unsigned char c) {
    return c >= 0x80 || (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z') || c == '_' || c == '\'';
}
static inline char lower(char c) { return c >= 'A' && c <= 'Z' ? c + 32 : c; }

#endif
