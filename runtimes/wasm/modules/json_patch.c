/* "data" with "patch" applied: an object by RFC 7396 (members replace those of the same name, null takes them away), or an array of
 * operations by RFC 6902 (add, remove, replace, move, copy, test at JSON Pointers). All of it or nothing: an operation that fails is an
 * error. */
#include "cargo.h"

static const Json nothing = {.kind = JSON_NULL};

static Json *copied(const Json *value) {
    Json *copy = need(sizeof *copy);
    *copy = *value;
    copy->first = copy->next = NULL;
    Json **tail = &copy->first;
    for (const Json *child = value->first; child; child = child->next) {
        *tail = copied(child);
        tail = &(*tail)->next;
    }
    return copy;
}

/* The link to the member of this name, the last one, or NULL. */
static Json **member(Json *object, const char *name, size_t size) {
    Json **found = NULL;
    for (Json **link = &object->first; *link; link = &(*link)->next)
        if ((*link)->key_size == size && !memcmp((*link)->key, name, size)) found = link;
    return found;
}

static void unlink_at(Json *parent, Json **link) {
    *link = (*link)->next;
    parent->size--;
}

static void link_at(Json *parent, Json **link, Json *child) {
    child->next = *link;
    *link = child;
    parent->size++;
}

static void set_member(Json *object, const char *name, size_t size, Json *value) {
    Json **link = member(object, name, size);
    value->key = name;
    value->key_size = size;
    if (link) {
        value->next = (*link)->next;
        *link = value;
        return;
    }
    for (link = &object->first; *link;) link = &(*link)->next;
    link_at(object, link, value);
}

/* RFC 7396, section 2: MergePatch(Target, Patch) */
static Json *merged(Json *target, const Json *patch) {
    if (patch->kind != JSON_OBJECT) return copied(patch);
    if (target->kind != JSON_OBJECT) {
        target = copied(&nothing);
        target->kind = JSON_OBJECT;
    }
    for (const Json *child = patch->first; child; child = child->next) {
        Json **link = member(target, child->key, child->key_size);
        if (child->kind == JSON_NULL) {
            if (link) unlink_at(target, link);
        } else {
            set_member(target, child->key, child->key_size, merged(link ? *link : copied(&nothing), child));
        }
    }
    return target;
}

static int64_t operation; /* counted from 1, for errors */

static void bad_operation(const char *why) {
    Buf b = {0};
    put_text(&b, "operation ");
    put_int(&b, operation);
    put_text(&b, ": ");
    put_text(&b, why);
    put_char(&b, 0);
    fail(b.at);
}

typedef struct {
    Json *parent; /* NULL: the whole document is meant */
    const char *name;
    size_t size;
} Place;

/* One token of an RFC 6901 pointer, decoded; *at is moved behind it. */
static Buf token(const char **at, const char *end) {
    Buf b = {0};
    for (++*at; *at < end && **at != '/'; ++*at) {
        if (**at != '~') {
            put_char(&b, **at);
        } else {
            ++*at;
            if (*at == end || (**at != '0' && **at != '1')) bad_operation("in a pointer ~ stands before 0 or 1 only");
            put_char(&b, **at == '0' ? '~' : '/');
        }
    }
    return b;
}

/* Of an array's entry: its link; the end of the array where "may_append" and the token is - or the length. */
static Json **entry(Json *array, const char *name, size_t size, bool may_append) {
    size_t index = 0;
    if (may_append && size == 1 && *name == '-') {
        index = array->size;
    } else {
        if (!size || size > 9 || (size > 1 && *name == '0')) bad_operation("no entry of an array has that number");
        for (size_t i = 0; i < size; i++) {
            if (name[i] < '0' || name[i] > '9') bad_operation("no entry of an array has that number");
            index = 10 * index + (size_t)(name[i] - '0');
        }
    }
    if (index > array->size || (index == array->size && !may_append)) bad_operation("the array has no such entry");
    Json **link = &array->first;
    while (index--) link = &(*link)->next;
    return link;
}

static Json **found_at(Json *parent, const char *name, size_t size) {
    Json **link = NULL;
    if (parent->kind == JSON_ARRAY) link = entry(parent, name, size, false);
    if (parent->kind == JSON_OBJECT) link = member(parent, name, size);
    if (!link) bad_operation("there is nothing at the pointer");
    return link;
}

static Place place_of(Json *document, const Json *pointer) {
    const char *at = pointer->text, *end = at + pointer->size;
    Place place = {NULL, NULL, 0};
    Json *value = document;
    if (at < end && *at != '/') bad_operation("a pointer is empty or begins with /");
    while (at < end) {
        if (place.parent) value = *found_at(place.parent, place.name, place.size);
        Buf name = token(&at, end);
        place = (Place){value, name.at, name.size};
    }
    return place;
}

static const Json *need_pointer(const Json *step, const char *name) {
    const Json *pointer = json_get(step, name, strlen(name));
    if (!pointer || pointer->kind != JSON_STRING) bad_operation("\"path\", and for move and copy \"from\", must be a string");
    return pointer;
}

static Json *value_at(Json *document, Place place) {
    return place.parent ? *found_at(place.parent, place.name, place.size) : document;
}

static Json *added(Json *document, Place place, Json *value) {
    if (!place.parent) return value;
    if (place.parent->kind == JSON_ARRAY) link_at(place.parent, entry(place.parent, place.name, place.size, true), value);
    else if (place.parent->kind == JSON_OBJECT) set_member(place.parent, place.name, place.size, value);
    else bad_operation("what the pointer leads through is neither object nor array");
    return document;
}

static void removed(Place place) {
    if (!place.parent) bad_operation("the whole document cannot be removed or moved");
    unlink_at(place.parent, found_at(place.parent, place.name, place.size));
}

static bool same_text(const char *a, size_t a_size, const char *b, size_t b_size) {
    return a_size == b_size && (!a_size || !memcmp(a, b, a_size));
}

/* RFC 6902, section 4.6: numbers by their values, objects in any order. */
static bool same(const Json *a, const Json *b) {
    if (a->kind != b->kind) return false;
    if (a->kind == JSON_NUMBER) return strtod(a->text, NULL) == strtod(b->text, NULL);
    if (a->kind == JSON_STRING) return same_text(a->text, a->size, b->text, b->size);
    if (a->size != b->size) return false;
    const Json *other = b->first;
    for (const Json *child = a->first; child; child = child->next) {
        const Json *with = a->kind == JSON_OBJECT ? json_get(b, child->key, child->key_size) : other;
        if (!with || !same(child, with)) return false;
        if (other) other = other->next;
    }
    return true;
}

static bool leads_into(const Json *from, const Json *path) {
    return path->size > from->size && path->text[from->size] == '/' && !memcmp(from->text, path->text, from->size);
}

static Json *operated(Json *document, const Json *step) {
    const Json *op = json_get(step, "op", 2), *value = json_get(step, "value", 5);
    if (!op || op->kind != JSON_STRING) bad_operation("it must be an object with \"op\"");
    const char *name = op->text;
    const Json *path = need_pointer(step, "path");
    bool moves = !strcmp(name, "move"), takes = moves || !strcmp(name, "copy");
    if (takes) {
        const Json *from = need_pointer(step, "from");
        if (moves && leads_into(from, path)) bad_operation("nothing can be moved into itself");
        Place source = place_of(document, from);
        Json *taken = copied(value_at(document, source));
        if (moves) removed(source);
        return added(document, place_of(document, path), taken);
    }
    Place place = place_of(document, path);
    if (!strcmp(name, "remove")) {
        removed(place);
        return document;
    }
    if (strcmp(name, "add") && strcmp(name, "replace") && strcmp(name, "test"))
        bad_operation("\"op\" must be add, remove, replace, move, copy or test");
    if (!value) bad_operation("it needs a \"value\"");
    if (!strcmp(name, "add")) return added(document, place, copied(value));
    Json *there = value_at(document, place);
    if (!strcmp(name, "test")) {
        if (!same(there, value)) bad_operation("the value is not the one that was expected");
        return document;
    }
    if (!place.parent) return copied(value);
    Json **link = found_at(place.parent, place.name, place.size), *put = copied(value);
    put->key = there->key;
    put->key_size = there->key_size;
    put->next = there->next;
    *link = put;
    return document;
}

int main(void) {
    const Json *in = input(), *data = json_get(in, "data", 4), *patch = field(in, "patch");
    if (!data) fail("the input needs \"data\"");
    if (!patch || (patch->kind != JSON_OBJECT && patch->kind != JSON_ARRAY))
        bad_field("patch", "an object (RFC 7396) or an array of operations (RFC 6902)");
    Json *document = copied(data);
    if (patch->kind == JSON_OBJECT) {
        document = merged(document, patch);
    } else {
        for (const Json *step = patch->first; step; step = step->next) {
            operation++;
            document = operated(document, step);
        }
    }
    Buf out = done_begin();
    done_key(&out, "data");
    put_json(&out, document);
    return done_end(&out);
}
