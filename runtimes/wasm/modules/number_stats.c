/* Figures of "numbers", an array: count, sum, min, max, mean, median, variance and standard deviation (of a sample, from two numbers
 * on), and "quantiles", an array of shares between 0 and 1 (default 0.25, 0.5, 0.75), between the two nearest numbers in proportion. */
#include "number.h"

#define MUST "an array of at least one number"

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Neumaier: what each addition loses is added at the end. */
static double exact_sum(const double *at, size_t size) {
    double sum = 0, lost = 0;
    for (size_t i = 0; i < size; i++) {
        double next = sum + at[i];
        lost += fabs(sum) >= fabs(at[i]) ? sum - next + at[i] : at[i] - next + sum;
        sum = next;
    }
    return sum + lost;
}

static double variance(const double *at, size_t size, double mean) {
    double *squares = need(size * sizeof *squares);
    for (size_t i = 0; i < size; i++) squares[i] = (at[i] - mean) * (at[i] - mean);
    return exact_sum(squares, size) / (double)(size - 1);
}

static double quantile(const double *sorted, size_t size, double share) {
    double place = share * (double)(size - 1);
    size_t below = (size_t)place;
    if (below + 1 >= size) return sorted[size - 1];
    double part = place - (double)below;
    return sorted[below] * (1 - part) + sorted[below + 1] * part; /* no difference, which could overflow */
}

static Numbers shares_of(const Json *in) {
    static double usual[] = {0.25, 0.5, 0.75};
    const char *must = "an array of at most 1000 numbers between 0 and 1";
    if (!field(in, "quantiles")) return (Numbers){usual, 3};
    Numbers shares = numbers_of(field(in, "quantiles"), "quantiles", must);
    if (shares.size > 1000) bad_field("quantiles", must);
    for (size_t i = 0; i < shares.size; i++)
        if (shares.at[i] < 0 || shares.at[i] > 1) bad_field("quantiles", must);
    return shares;
}

int main(void) {
    const Json *in = input();
    Numbers numbers = numbers_of(field(in, "numbers"), "numbers", MUST), shares = shares_of(in);
    if (!numbers.size) bad_field("numbers", MUST);
    double sum = exact_sum(numbers.at, numbers.size), mean = sum / (double)numbers.size;
    qsort(numbers.at, numbers.size, sizeof *numbers.at, by_size);
    Buf out = done_begin();
    done_int(&out, "count", (int64_t)numbers.size);
    done_number(&out, "sum", sum);
    done_number(&out, "min", numbers.at[0]);
    done_number(&out, "max", numbers.at[numbers.size - 1]);
    done_number(&out, "mean", mean);
    done_number(&out, "median", quantile(numbers.at, numbers.size, 0.5));
    if (numbers.size > 1) {
        double spread = variance(numbers.at, numbers.size, mean);
        done_number(&out, "variance", spread);
        done_number(&out, "deviation", sqrt(spread));
    }
    done_key(&out, "quantiles");
    put_char(&out, '[');
    for (size_t i = 0; i < shares.size; i++) {
        if (i) put_char(&out, ',');
        put_number(&out, quantile(numbers.at, numbers.size, shares.at[i]));
    }
    put_char(&out, ']');
    return done_end(&out);
}
