/* Matrices, arrays of rows of numbers, at most 256 rows and columns. "op": multiply ("a" by "b"), solve (x in "a" x = "b"), inverse,
 * determinant or transpose of "a". Gaussian elimination, each time by the largest entry of a column; a matrix that has no inverse is an
 * error. */
#include "number.h"

#define SIDE_MAX 256

typedef struct {
    int rows, columns;
    double *at;
} Matrix;

static Matrix made(int rows, int columns) {
    Matrix m = {rows, columns, need((size_t)rows * (size_t)columns * sizeof(double))};
    memset(m.at, 0, (size_t)rows * (size_t)columns * sizeof(double));
    return m;
}

static Matrix need_matrix(const Json *in, const char *name) {
    const char *must = "an array of 1 to 256 rows, each an array of as many numbers (1 to 256)";
    const Json *rows = field(in, name);
    if (!rows || rows->kind != JSON_ARRAY || !rows->size || rows->size > SIDE_MAX) bad_field(name, must);
    if (rows->first->kind != JSON_ARRAY || !rows->first->size || rows->first->size > SIDE_MAX) bad_field(name, must);
    Matrix m = made((int)rows->size, (int)rows->first->size);
    double *at = m.at;
    for (const Json *row = rows->first; row; row = row->next) {
        Numbers numbers = numbers_of(row, name, must);
        if (numbers.size != (size_t)m.columns) bad_field(name, must);
        memcpy(at, numbers.at, numbers.size * sizeof *at);
        at += m.columns;
    }
    return m;
}

static Matrix need_square(const Json *in) {
    Matrix a = need_matrix(in, "a");
    if (a.rows != a.columns) bad_field("a", "a matrix of as many rows as columns");
    return a;
}

static Matrix multiplied(Matrix a, Matrix b) {
    if (a.columns != b.rows) bad_field("b", "a matrix of as many rows as \"a\" has columns");
    Matrix m = made(a.rows, b.columns);
    for (int i = 0; i < a.rows; i++)
        for (int k = 0; k < a.columns; k++)
            for (int j = 0; j < b.columns; j++) m.at[i * m.columns + j] += a.at[i * a.columns + k] * b.at[k * b.columns + j];
    return m;
}

static Matrix transposed(Matrix a) {
    Matrix m = made(a.columns, a.rows);
    for (int i = 0; i < a.rows; i++)
        for (int j = 0; j < a.columns; j++) m.at[j * m.columns + i] = a.at[i * a.columns + j];
    return m;
}

static Matrix identity(int side) {
    Matrix m = made(side, side);
    for (int i = 0; i < side; i++) m.at[i * side + i] = 1;
    return m;
}

static void swap_rows(Matrix m, int one, int other) {
    for (int j = 0; j < m.columns; j++) {
        double kept = m.at[one * m.columns + j];
        m.at[one * m.columns + j] = m.at[other * m.columns + j];
        m.at[other * m.columns + j] = kept;
    }
}

static void take_row(Matrix m, int from, int what, double times) {
    for (int j = 0; j < m.columns; j++) m.at[from * m.columns + j] -= times * m.at[what * m.columns + j];
}

static double largest(Matrix m) {
    double most = 0;
    for (int i = 0; i < m.rows * m.columns; i++) most = fmax(most, fabs(m.at[i]));
    return most;
}

/* Makes "a" upper triangular and does the same to "b"; the determinant, or 0 where a column has nothing but rounding left. */
static double eliminate(Matrix a, Matrix b) {
    double determinant = 1, nothing = largest(a) * a.rows * 0x1p-52;
    for (int k = 0; k < a.rows; k++) {
        int pivot = k;
        for (int i = k + 1; i < a.rows; i++)
            if (fabs(a.at[i * a.columns + k]) > fabs(a.at[pivot * a.columns + k])) pivot = i;
        if (fabs(a.at[pivot * a.columns + k]) <= nothing) return 0;
        if (pivot != k) {
            swap_rows(a, pivot, k);
            swap_rows(b, pivot, k);
            determinant = -determinant;
        }
        determinant *= a.at[k * a.columns + k];
        for (int i = k + 1; i < a.rows; i++) {
            double times = a.at[i * a.columns + k] / a.at[k * a.columns + k];
            take_row(a, i, k, times);
            take_row(b, i, k, times);
        }
    }
    return determinant;
}

static Matrix solved(Matrix a, Matrix b) {
    if (b.rows != a.rows) bad_field("b", "a matrix of as many rows as \"a\"");
    if (eliminate(a, b) == 0) fail("\"a\" has no inverse");
    for (int k = a.rows - 1; k >= 0; k--) {
        for (int j = 0; j < b.columns; j++) b.at[k * b.columns + j] /= a.at[k * a.columns + k];
        for (int i = 0; i < k; i++) take_row(b, i, k, a.at[i * a.columns + k]);
    }
    return b;
}

static void done_matrix(Buf *out, Matrix m) {
    done_key(out, "result");
    put_char(out, '[');
    for (int i = 0; i < m.rows; i++) {
        put_text(out, i ? ",[" : "[");
        for (int j = 0; j < m.columns; j++) {
            if (j) put_char(out, ',');
            put_number(out, m.at[i * m.columns + j]);
        }
        put_char(out, ']');
    }
    put_char(out, ']');
}

int main(void) {
    const Json *in = input();
    const char *op = need_string(in, "op")->text;
    Buf out = done_begin();
    if (!strcmp(op, "multiply")) {
        done_matrix(&out, multiplied(need_matrix(in, "a"), need_matrix(in, "b")));
    } else if (!strcmp(op, "solve")) {
        done_matrix(&out, solved(need_square(in), need_matrix(in, "b")));
    } else if (!strcmp(op, "inverse")) {
        Matrix a = need_square(in);
        done_matrix(&out, solved(a, identity(a.rows)));
    } else if (!strcmp(op, "transpose")) {
        done_matrix(&out, transposed(need_matrix(in, "a")));
    } else if (!strcmp(op, "determinant")) {
        Matrix a = need_square(in);
        done_number(&out, "result", eliminate(a, made(a.rows, 1)));
    } else {
        bad_field("op", "multiply, solve, inverse, transpose or determinant");
    }
    return done_end(&out);
}
