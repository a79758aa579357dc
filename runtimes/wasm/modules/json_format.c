/* "data" as text: minified, or with "indent" spaces (1 to 8); "sort_keys" orders the members of objects by the bytes of their names. */
#include "cargo.h"

static int64_t indent;
static bool sort_keys;

static int by_key(const void *a, const void *b) {
    const Json *x = *(const Json *const *)a, *y = *(const Json *const *)b;
    int difference = memcmp(x->key, y->key, x->key_size < y->key_size ? x->key_size : y->key_size);
    return difference ? difference : x->key_size < y->key_size ? -1 : x->key_size > y->key_size;
}

static void new_line(Buf *b, int depth) {
    if (!indent) return;
    put_char(b, '\n');
    for (int64_t i = 0; i < indent * depth; i++) put_char(b, ' ');
}

static void write_value(Buf *b, const Json *value, int depth) {
    if (value->kind < JSON_ARRAY || !value->size) {
        put_json(b, value);
        return;
    }
    const Json **children = need(value->size * sizeof *children);
    size_t count = 0;
    for (const Json *child = value->first; child; child = child->next) children[count++] = child;
    if (sort_keys && value->kind == JSON_OBJECT) qsort(children, count, sizeof *children, by_key);
    put_char(b, value->kind == JSON_OBJECT ? '{' : '[');
    for (size_t i = 0; i < count; i++) {
        if (i) put_char(b, ',');
        new_line(b, depth + 1);
        if (value->kind == JSON_OBJECT) {
            put_string(b, children[i]->key, children[i]->key_size);
            put_text(b, indent ? ": " : ":");
        }
        write_value(b, children[i], depth + 1);
    }
    new_line(b, depth);
    put_char(b, value->kind == JSON_OBJECT ? '}' : ']');
}

int main(void) {
    const Json *in = input(), *data = json_get(in, "data", 4);
    if (!data) fail("the input needs \"data\"");
    indent = int_or(in, "indent", 0, 0, 8);
    sort_keys = bool_or(in, "sort_keys", false);
    Buf text = {0}, out = done_begin();
    write_value(&text, data, 0);
    done_string(&out, "text", text.at, text.size);
    done_int(&out, "bytes", (int64_t)text.size);
    return done_end(&out);
}
