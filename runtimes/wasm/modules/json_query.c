/* Picks values out of "data" by "path": names and [numbers] joined by dots, * for all, ** for all at any depth, negative numbers from the
 * end, "quoted names". A path "users.*.name" gives {"matches": […], "count": n}. */
#include "cargo.h"

typedef enum { NAME, INDEX, ALL, DEEP } StepKind;
typedef struct {
    StepKind kind;
    const char *name;
    size_t size;
    int64_t index;
} Step;

static Step steps[DEPTH_MAX];
static int step_count;
static Buf found;
static int64_t count;

static void bad_path(void) { fail("\"path\" must be names, *, ** and [numbers], joined by dots"); }

static void add_step(Step step) {
    if (step_count == DEPTH_MAX) fail("\"path\" has too many steps");
    steps[step_count++] = step;
}

static const char *read_index(const char *at) {
    if (*at == '*') {
        add_step((Step){.kind = ALL});
        at++;
    } else {
        bool minus = *at == '-';
        int64_t value = 0;
        const char *first = at += minus;
        while (*at >= '0' && *at <= '9' && at - first < 15) value = 10 * value + (*at++ - '0');
        if (at == first) bad_path();
        add_step((Step){.kind = INDEX, .index = minus ? -value : value});
    }
    if (*at != ']') bad_path();
    return at + 1;
}

static const char *read_name(const char *at) {
    char quote = *at == '"' || *at == '\'' ? *at++ : 0;
    const char *first = at;
    while (*at && (quote ? *at != quote : *at != '.' && *at != '[')) at++;
    size_t size = at - first;
    if (quote && *at++ != quote) bad_path();
    if (!size && !quote) bad_path();
    if (!quote && size == 1 && *first == '*') add_step((Step){.kind = ALL});
    else if (!quote && size == 2 && !memcmp(first, "**", 2)) add_step((Step){.kind = DEEP});
    else add_step((Step){.kind = NAME, .name = first, .size = size});
    return at;
}

static void read_path(const char *at) {
    while (*at) {
        if (*at == '[') {
            at = read_index(at + 1);
        } else {
            if (*at == '.' && step_count) at++;
            at = read_name(at);
        }
    }
}

static void pick(const Json *value, int step) {
    if (step == step_count) {
        if (count++) put_char(&found, ',');
        put_json(&found, value);
        return;
    }
    const Step *s = steps + step;
    if (s->kind == NAME) {
        const Json *child = json_get(value, s->name, s->size);
        if (child) pick(child, step + 1);
    } else if (s->kind == INDEX) {
        int64_t index = s->index < 0 ? (int64_t)value->size + s->index : s->index;
        const Json *child = value->kind == JSON_ARRAY && index >= 0 ? value->first : NULL;
        while (child && index--) child = child->next;
        if (child) pick(child, step + 1);
    } else {
        if (s->kind == DEEP) pick(value, step + 1);
        if (value->kind < JSON_ARRAY) return;
        for (const Json *child = value->first; child; child = child->next) pick(child, s->kind == DEEP ? step : step + 1);
    }
}

int main(void) {
    const Json *in = input(), *data = json_get(in, "data", 4);
    if (!data) fail("the input needs \"data\"");
    read_path(need_string(in, "path")->text);
    pick(data, 0);
    Buf out = done_begin();
    done_key(&out, "matches");
    put_char(&out, '[');
    put(&out, found.at, found.size);
    put_char(&out, ']');
    done_int(&out, "count", count);
    return done_end(&out);
}
