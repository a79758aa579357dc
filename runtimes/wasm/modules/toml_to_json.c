/* "toml" (TOML 1.0) as JSON: {"data": {…}}. Dates and times become texts as they are written, with T and Z; inf and nan become texts
 * too. What TOML forbids, such as a table that is defined twice, is an error with its line. */
#include "cargo.h"

#define DEEP_MAX 100
#define KEY_PARTS_MAX 50

typedef enum { SCALAR, ARRAY, TABLE, TABLES } NodeKind; /* TABLES: an array of tables by [[…]] */

typedef struct Node {
    NodeKind kind;
    bool is_closed;    /* written in one place, between [ and ] or { and } */
    bool is_headed;    /* has its own [header] */
    int64_t dotted_in; /* the section whose dotted keys have last gone through it, or 0 */
    Buf json, key;
    struct Node *first, *last, *next;
} Node;

typedef struct {
    Buf parts[KEY_PARTS_MAX];
    int count;
} Key;

static const char *begin, *at, *end;
static int64_t section = 1;

static void bad_toml(const char *why) {
    int64_t line = 1;
    for (const char *p = begin; p < at && p < end; p++) line += *p == '\n';
    Buf b = {0};
    put_text(&b, "line ");
    put_int(&b, line);
    put_text(&b, ": ");
    put_text(&b, why);
    put_char(&b, 0);
    fail(b.at);
}

static Node *made(NodeKind kind) {
    Node *node = need(sizeof *node);
    memset(node, 0, sizeof *node);
    node->kind = kind;
    return node;
}

static void append(Node *parent, Node *child) {
    if (parent->last) parent->last->next = child;
    else parent->first = child;
    parent->last = child;
}

static Node *child_of(Node *table, const Buf *key) {
    for (Node *child = table->first; child; child = child->next)
        if (child->key.size == key->size && (!key->size || !memcmp(child->key.at, key->at, key->size))) return child;
    return NULL;
}

static Node *add_child(Node *table, const Buf *key, Node *child) {
    child->key = *key;
    append(table, child);
    return child;
}

/* Scanning */

static bool ahead(const char *text) {
    size_t size = strlen(text);
    return (size_t)(end - at) >= size && !memcmp(at, text, size);
}

static bool take(const char *text) {
    if (!ahead(text)) return false;
    at += strlen(text);
    return true;
}

static void skip_blanks(void) {
    while (at < end && (*at == ' ' || *at == '\t')) at++;
}

static void check_character(void) {
    unsigned char c = (unsigned char)*at;
    if ((c < 32 && c != '\t') || c == 127) bad_toml("a control character is not allowed");
}

static void skip_comment(void) {
    if (at == end || *at != '#') return;
    for (; at < end && *at != '\n'; at++) check_character();
}

static void skip_lines(void) {
    do {
        skip_blanks();
        skip_comment();
    } while (take("\n"));
}

static void end_line(void) {
    skip_blanks();
    skip_comment();
    if (at < end && !take("\n")) bad_toml("something stands behind the end of a line's key, table or value");
}

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

static bool is_bare(char c) { return is_digit(c) || ((c | 32) >= 'a' && (c | 32) <= 'z') || c == '_' || c == '-'; }

/* Strings */

static void read_code(Buf *b, int count) {
    uint32_t value = 0;
    while (count--) {
        char c = at < end ? *at++ : 0;
        int digit = is_digit(c) ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1;
        if (digit < 0) bad_toml("\\u is followed by 4, \\U by 8 hexadecimal digits");
        value = value << 4 | (uint32_t)digit;
    }
    if (value > 0x10FFFF || (value >= 0xD800 && value < 0xE000)) bad_toml("\\u or \\U names no character");
    put_utf8(b, value);
}

/* A backslash at the end of a line takes away all white space up to the next text. */
static bool took_line_end(void) {
    const char *kept = at;
    skip_blanks();
    if (at == end || *at != '\n') {
        at = kept;
        return false;
    }
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\n')) at++;
    return true;
}

static void read_escape(Buf *b, bool many_lines) {
    static const char names[] = "btnfr\"\\", values[] = "\b\t\n\f\r\"\\";
    if (many_lines && took_line_end()) return;
    char c = at < end ? *at++ : 0;
    const char *found = c ? strchr(names, c) : NULL;
    if (found) put_char(b, values[found - names]);
    else if (c == 'u') read_code(b, 4);
    else if (c == 'U') read_code(b, 8);
    else bad_toml("a backslash is followed by none of b t n f r \" \\ u U");
}

static Buf read_line_string(char quote) {
    Buf b = {0};
    for (at++;; ) {
        if (at == end || *at == '\n') bad_toml("a string has no end on its line");
        char c = *at;
        check_character();
        at++;
        if (c == quote) return b;
        if (c == '\\' && quote == '"') read_escape(&b, false);
        else put_char(&b, c);
    }
}

static Buf read_long_string(char quote) {
    const char *mark = quote == '"' ? "\"\"\"" : "'''";
    Buf b = {0};
    at += 3;
    take("\n");
    for (;;) {
        if (at == end) bad_toml("a string has no end");
        if (take(mark)) {
            for (int more = 0; more < 2 && at < end && *at == quote; more++) put_char(&b, *at++); /* up to two quotes before the mark */
            return b;
        }
        if (*at != '\n') check_character();
        char c = *at++;
        if (c == '\\' && quote == '"') read_escape(&b, true);
        else put_char(&b, c);
    }
}

/* Keys */

static Buf read_key_part(void) {
    if (at < end && (*at == '"' || *at == '\'')) return read_line_string(*at);
    const char *first = at;
    while (at < end && is_bare(*at)) at++;
    if (at == first) bad_toml("a key is missing");
    return (Buf){(char *)first, (size_t)(at - first), 0};
}

static void read_key(Key *key) {
    key->count = 0;
    do {
        skip_blanks();
        if (key->count == KEY_PARTS_MAX) bad_toml("a key has too many parts");
        key->parts[key->count++] = read_key_part();
        skip_blanks();
    } while (take("."));
}

/* Values */

static Node *read_value(int depth);

static bool is_of_base(char c, int base) {
    static const char digits[] = "0123456789abcdef";
    const char *found = c ? strchr(digits, lower(c)) : NULL;
    return found && found - digits < base;
}

/* Digits with single _ between them, which are left out; whether there was one. */
static bool read_digits(Buf *b, int base) {
    size_t before = b->size;
    for (; at < end; at++) {
        bool is_one = is_of_base(*at, base);
        if (!is_one && (*at != '_' || b->size == before)) break;
        if (is_one) put_char(b, *at);
        else if (at + 1 == end || !is_of_base(at[1], base)) bad_toml("_ stands between digits only");
    }
    return b->size > before;
}

static void read_based(Buf *json, int base) {
    Buf digits = {0};
    uint64_t value = 0;
    at += 2;
    if (!read_digits(&digits, base)) bad_toml("a number has no digits");
    for (size_t i = 0; i < digits.size; i++) {
        char c = lower(digits.at[i]);
        if (value >> 59) bad_toml("a number has more than 63 bits");
        value = value * (uint64_t)base + (uint64_t)(c <= '9' ? c - '0' : c - 'a' + 10);
    }
    if (value >> 63) bad_toml("a number has more than 63 bits");
    put_int(json, (int64_t)value);
}

static void read_decimal(Buf *json) {
    if (*at == '-') put_char(json, '-');
    if (*at == '-' || *at == '+') at++;
    if (ahead("inf") || ahead("nan")) {
        Buf word = {0};
        if (json->size) put_char(&word, '-');
        put(&word, at, 3);
        at += 3;
        json->size = 0;
        put_string(json, word.at, word.size);
        return;
    }
    size_t whole = json->size;
    if (!read_digits(json, 10)) bad_toml("a value is missing or none of TOML's");
    if (json->at[whole] == '0' && json->size > whole + 1) bad_toml("a number begins with 0");
    if (take(".")) {
        put_char(json, '.');
        if (!read_digits(json, 10)) bad_toml("behind a number's point a digit is missing");
    }
    if (at < end && lower(*at) == 'e') {
        put_char(json, *at++);
        if (at < end && (*at == '+' || *at == '-')) put_char(json, *at++);
        if (!read_digits(json, 10)) bad_toml("a number's exponent is missing");
    }
}

static bool is_shape(const char *from, const char *shape) {
    for (; *shape; shape++, from++)
        if (from >= end || (*shape == '0' ? !is_digit(*from) : *from != *shape)) return false;
    return true;
}

static int two(const char *from) { return 10 * (from[0] - '0') + from[1] - '0'; }

static void copy_time(Buf *text) {
    if (!is_shape(at, "00:00:00") || two(at) > 23 || two(at + 3) > 59 || two(at + 6) > 59) bad_toml("there is no such time");
    put(text, at, 8);
    at += 8;
    if (at + 1 < end && *at == '.' && is_digit(at[1])) {
        do put_char(text, *at++); while (at < end && is_digit(*at));
    }
}

static void copy_zone(Buf *text) {
    if (at < end && lower(*at) == 'z') {
        put_char(text, 'Z');
        at++;
    } else if (at < end && (*at == '+' || *at == '-')) {
        if (!is_shape(at + 1, "00:00") || two(at + 1) > 23 || two(at + 4) > 59) bad_toml("there is no such zone");
        put(text, at, 6);
        at += 6;
    }
}

static void copy_date(Buf *text) {
    static const uint8_t days[] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
    int year = 100 * two(at) + two(at + 2), month = two(at + 5), day = two(at + 8);
    bool leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    if (!year || month < 1 || month > 12 || day < 1 || day > days[month - 1] + (month == 2 && leap)) bad_toml("there is no such date");
    put(text, at, 10);
    at += 10;
    bool has_time = at < end && (lower(*at) == 't' || (*at == ' ' && is_shape(at + 1, "00:")));
    if (!has_time) return;
    put_char(text, 'T');
    at++;
    copy_time(text);
    copy_zone(text);
}

static Node *read_array(int depth) {
    Node *array = made(ARRAY);
    at++;
    for (;;) {
        skip_lines();
        if (take("]")) return array;
        append(array, read_value(depth + 1));
        skip_lines();
        if (take("]")) return array;
        if (!take(",")) bad_toml("in an array a comma or ] is missing");
    }
}

static void read_pair(Node *table, int depth);

static Node *read_inline_table(int depth) {
    Node *table = made(TABLE);
    int64_t outer = section;
    section = INT64_MAX - depth; /* its dotted keys are its own */
    at++;
    skip_blanks();
    if (!take("}")) {
        do {
            skip_blanks();
            read_pair(table, depth + 1);
            skip_blanks();
        } while (take(","));
        if (!take("}")) bad_toml("in an inline table a comma or } is missing");
    }
    section = outer;
    return table;
}

static Node *read_scalar(void) {
    Node *node = made(SCALAR);
    Buf text = {0};
    if (ahead("\"\"\"") || ahead("'''")) text = read_long_string(*at);
    else if (*at == '"' || *at == '\'') text = read_line_string(*at);
    else if (is_shape(at, "0000-00-00")) copy_date(&text);
    else if (is_shape(at, "00:")) copy_time(&text);
    else if (take("true")) put_text(&node->json, "true");
    else if (take("false")) put_text(&node->json, "false");
    else if (ahead("0x")) read_based(&node->json, 16);
    else if (ahead("0o")) read_based(&node->json, 8);
    else if (ahead("0b")) read_based(&node->json, 2);
    else read_decimal(&node->json);
    if (!node->json.size) put_string(&node->json, text.at, text.size);
    return node;
}

static Node *read_value(int depth) {
    if (depth > DEEP_MAX) bad_toml("values are nested too deeply");
    if (at == end) bad_toml("a value is missing");
    Node *node = *at == '[' ? read_array(depth) : *at == '{' ? read_inline_table(depth) : read_scalar();
    node->is_closed = true;
    return node;
}

/* key = value, where the key may be dotted: then the tables on its way are this section's. */
static void read_pair(Node *table, int depth) {
    Key key;
    read_key(&key);
    for (int i = 0; i + 1 < key.count; i++) {
        Node *child = child_of(table, &key.parts[i]);
        if (!child) child = add_child(table, &key.parts[i], made(TABLE));
        bool of_others = child->kind != TABLE || child->is_closed || child->is_headed || (child->dotted_in && child->dotted_in != section);
        if (of_others) bad_toml("a dotted key leads into what is defined elsewhere");
        child->dotted_in = section;
        table = child;
    }
    if (!take("=")) bad_toml("behind a key = is missing");
    skip_blanks();
    Buf *last = &key.parts[key.count - 1];
    if (child_of(table, last)) bad_toml("a key stands twice");
    add_child(table, last, read_value(depth));
}

/* Headers */

static Node *way_to(Node *table, const Key *key) {
    for (int i = 0; i + 1 < key->count; i++) {
        Node *child = child_of(table, &key->parts[i]);
        if (!child) child = add_child(table, &key->parts[i], made(TABLE));
        if (child->is_closed || child->kind == SCALAR) bad_toml("a table's name leads through a value");
        table = child->kind == TABLES ? child->last : child;
    }
    return table;
}

static Node *read_header(Node *root) {
    bool is_entry = take("[[");
    if (!is_entry) at++;
    Key key;
    read_key(&key);
    if (!take(is_entry ? "]]" : "]")) bad_toml("a table's name has no end");
    section++;
    Node *parent = way_to(root, &key);
    Buf *last = &key.parts[key.count - 1];
    Node *found = child_of(parent, last);
    if (is_entry) {
        if (!found) found = add_child(parent, last, made(TABLES));
        if (found->kind != TABLES) bad_toml("an array of tables has the name of something else");
        append(found, made(TABLE));
        found->last->is_headed = true;
        return found->last;
    }
    if (!found) found = add_child(parent, last, made(TABLE));
    if (found->kind != TABLE || found->is_closed || found->is_headed || found->dotted_in) bad_toml("a table is defined twice");
    found->is_headed = true;
    return found;
}

static void put_node(Buf *b, const Node *node) {
    if (node->kind == SCALAR) {
        put(b, node->json.at, node->json.size);
        return;
    }
    bool is_table = node->kind == TABLE;
    put_char(b, is_table ? '{' : '[');
    for (const Node *child = node->first; child; child = child->next) {
        if (child != node->first) put_char(b, ',');
        if (is_table) {
            put_string(b, child->key.at, child->key.size);
            put_char(b, ':');
        }
        put_node(b, child);
    }
    put_char(b, is_table ? '}' : ']');
}

static Buf with_plain_lines(const Json *toml) {
    Buf b = {0};
    for (size_t i = 0; i < toml->size; i++)
        if (toml->text[i] != '\r' || i + 1 == toml->size || toml->text[i + 1] != '\n') put_char(&b, toml->text[i]);
    return b;
}

int main(void) {
    const Json *in = input();
    Buf toml = with_plain_lines(need_string(in, "toml"));
    Node *root = made(TABLE), *table = root;
    begin = at = toml.at;
    end = at + toml.size;
    for (skip_lines(); at < end; skip_lines()) {
        if (*at == '[') table = read_header(root);
        else read_pair(table, 0);
        end_line();
    }
    Buf out = done_begin();
    done_key(&out, "data");
    put_node(&out, root);
    return done_end(&out);
}
