/* RFC 4180 "csv" to rows: objects by the names of the first line, or arrays where "header" is false. "delimiter": one character, default
 * a comma. "numbers": whether what is written as a JSON number becomes one (default true). */
#include "cargo.h"

static const char *at, *end;
static char delimiter;
static bool numbers;

typedef struct {
    Buf text;
    bool quoted, ends_row;
} Cell;

static Cell next_cell(void) {
    Cell cell = {0};
    if (at < end && *at == '"') {
        cell.quoted = true;
        for (at++;; at++) {
            if (at == end) fail("a quoted field has no end");
            if (*at == '"' && !(at + 1 < end && at[1] == '"')) break;
            if (*at == '"') at++;
            put_char(&cell.text, *at);
        }
        at++;
    }
    while (at < end && *at != delimiter && *at != '\n' && *at != '\r') put_char(&cell.text, *at++);
    cell.ends_row = at == end || *at != delimiter;
    if (at < end && *at == '\r') at++;
    if (at < end && (*at == '\n' || !cell.ends_row)) at++;
    return cell;
}

static bool is_number(const Buf *b) {
    size_t i = 0;
    if (b->size && b->at[0] == '-') i++;
    size_t whole = i;
    while (i < b->size && b->at[i] >= '0' && b->at[i] <= '9') i++;
    if (i == whole || (b->at[whole] == '0' && i > whole + 1)) return false;
    if (i < b->size && b->at[i] == '.') {
        size_t fraction = ++i;
        while (i < b->size && b->at[i] >= '0' && b->at[i] <= '9') i++;
        if (i == fraction) return false;
    }
    return i == b->size;
}

static void put_cell(Buf *out, const Cell *cell) {
    if (numbers && !cell->quoted && is_number(&cell->text)) put(out, cell->text.at, cell->text.size);
    else put_string(out, cell->text.at, cell->text.size);
}

#define COLUMNS_MAX 4096
static Cell names[COLUMNS_MAX];

int main(void) {
    const Json *in = input(), *csv = need_string(in, "csv");
    const char *mark = string_or(in, "delimiter", ",");
    if (strlen(mark) != 1 || *mark == '"' || *mark == '\n' || *mark == '\r') bad_field("delimiter", "one character, such as ; or a tab");
    delimiter = *mark;
    numbers = bool_or(in, "numbers", true);
    bool header = bool_or(in, "header", true);
    at = csv->text;
    end = at + csv->size;
    int columns = 0;
    int64_t rows = 0;
    if (header && at < end) {
        do {
            if (columns == COLUMNS_MAX) fail("the first line has too many columns");
            names[columns] = next_cell();
        } while (!names[columns++].ends_row);
    }
    Buf out = done_begin();
    done_key(&out, "rows");
    put_char(&out, '[');
    while (at < end) {
        if (*at == '\n' || *at == '\r') { /* an empty line is no row */
            at++;
            continue;
        }
        if (rows++) put_char(&out, ',');
        put_char(&out, header ? '{' : '[');
        for (int column = 0;; column++) {
            Cell cell = next_cell();
            if (column) put_char(&out, ',');
            if (header) {
                if (column == columns) {
                    Buf text = {0};
                    put_text(&text, "row ");
                    put_int(&text, rows);
                    put_text(&text, " has more fields than the first line");
                    put_char(&text, 0);
                    fail(text.at);
                }
                put_string(&out, names[column].text.at, names[column].text.size);
                put_char(&out, ':');
            }
            put_cell(&out, &cell);
            if (cell.ends_row) break;
        }
        put_char(&out, header ? '}' : ']');
    }
    put_char(&out, ']');
    done_int(&out, "count", rows);
    return done_end(&out);
}
