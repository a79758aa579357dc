/* Dates and times by ISO 8601, years 1 to 9999. "date" (2026-02-28, or 2026-02-28T12:30:00, with .5, Z or +01:00) is moved by whole
 * "years", "months" (a day that the month has not becomes its last), "weeks", "days", "hours", "minutes", "seconds", also negative.
 * Gives "date", "weekday" (1 is Monday), "day_of_year", ISO "week" and "week_year", "leap", "unix_s" (as if in UTC where there is no
 * zone); with "until", another date, "days" and whole "seconds" to it. */
#include "cargo.h"

#define SHIFT_MAX 1000000000000

typedef struct {
    int64_t days;    /* since 1970-01-01, in its own zone */
    int64_t second;  /* of the day */
    int64_t zone_s;  /* ahead of UTC */
    bool has_time, has_zone;
    const char *fraction; /* with its point, as it was written */
    size_t fraction_size;
} Moment;

static const char *name;

static void bad_date(void) {
    bad_field(name, "a date like 2026-02-28, 2026-02-28T12:30:00Z or 2026-02-28T12:30:00.5+01:00, that there is");
}

static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

static bool is_leap(int64_t year) { return year % 4 == 0 && (year % 100 != 0 || year % 400 == 0); }

static int64_t month_days(int64_t year, int64_t month) {
    return month == 2 ? 28 + is_leap(year) : 30 + ((month + month / 8) & 1);
}

/* Days since 1970-01-01; years begin in March, so that the leap day comes last (Howard Hinnant, chrono-compatible date algorithms). */
static int64_t days_of(int64_t year, int64_t month, int64_t day) {
    year -= month <= 2;
    int64_t era = floor_div(year, 400), year_of_era = year - era * 400;
    int64_t day_of_year = (153 * (month + (month > 2 ? -3 : 9)) + 2) / 5 + day - 1;
    return era * 146097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719468;
}

static void civil(int64_t days, int64_t *year, int64_t *month, int64_t *day) {
    days += 719468;
    int64_t era = floor_div(days, 146097), day_of_era = days - era * 146097;
    int64_t year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146096) / 365;
    int64_t day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100), shifted = (5 * day_of_year + 2) / 153;
    *day = day_of_year - (153 * shifted + 2) / 5 + 1;
    *month = shifted + (shifted < 10 ? 3 : -9);
    *year = year_of_era + era * 400 + (*month <= 2);
}

static int64_t digits(const char **at, int count, int64_t low, int64_t high) {
    int64_t value = 0;
    while (count--) {
        if (**at < '0' || **at > '9') bad_date();
        value = 10 * value + *(*at)++ - '0';
    }
    if (value < low || value > high) bad_date();
    return value;
}

static void skip(const char **at, char c) {
    if (*(*at)++ != c) bad_date();
}

static void read_zone(Moment *m, const char **at) {
    m->has_zone = true;
    if ((**at | 32) == 'z') {
        ++*at;
        return;
    }
    int sign = *(*at)++ == '-' ? -1 : 1;
    int64_t hours = digits(at, 2, 0, 23);
    if (**at == ':') ++*at;
    m->zone_s = sign * (hours * 3600 + digits(at, 2, 0, 59) * 60);
}

static void read_time(Moment *m, const char **at) {
    m->has_time = true;
    m->second = digits(at, 2, 0, 23) * 3600;
    skip(at, ':');
    m->second += digits(at, 2, 0, 59) * 60;
    if (**at == ':') {
        ++*at;
        m->second += digits(at, 2, 0, 59);
        if (**at == '.') {
            m->fraction = (*at)++;
            digits(at, 1, 0, 9);
            while (**at >= '0' && **at <= '9') ++*at;
            m->fraction_size = (size_t)(*at - m->fraction);
        }
    }
    if ((**at | 32) == 'z' || **at == '+' || **at == '-') read_zone(m, at);
}

static Moment need_moment(const Json *in, const char *field_name) {
    name = field_name;
    const Json *text = need_string(in, name);
    const char *at = text->text;
    Moment m = {0};
    int64_t year = digits(&at, 4, 1, 9999);
    skip(&at, '-');
    int64_t month = digits(&at, 2, 1, 12);
    skip(&at, '-');
    m.days = days_of(year, month, digits(&at, 2, 1, month_days(year, month)));
    if (*at == 'T' || *at == 't' || *at == ' ') {
        at++;
        read_time(&m, &at);
    }
    if (at != text->text + text->size) bad_date();
    return m;
}

static int64_t shift(const Json *in, const char *unit) { return int_or(in, unit, 0, -SHIFT_MAX, SHIFT_MAX); }

static void check_days(int64_t days) {
    if (days < days_of(1, 1, 1) || days > days_of(9999, 12, 31)) fail("the result is not in the years 1 to 9999");
}

static void move(Moment *m, const Json *in) {
    int64_t year, month, day, months = 12 * shift(in, "years") + shift(in, "months");
    civil(m->days, &year, &month, &day);
    months += 12 * year + month - 1;
    year = floor_div(months, 12);
    month = months - 12 * year + 1;
    if (year < 1 || year > 9999) fail("the result is not in the years 1 to 9999");
    if (day > month_days(year, month)) day = month_days(year, month);
    int64_t seconds = m->second + 3600 * shift(in, "hours") + 60 * shift(in, "minutes") + shift(in, "seconds");
    m->days = days_of(year, month, day) + 7 * shift(in, "weeks") + shift(in, "days") + floor_div(seconds, 86400);
    m->second = seconds - 86400 * floor_div(seconds, 86400);
    m->has_time = m->has_time || field(in, "hours") || field(in, "minutes") || field(in, "seconds");
    check_days(m->days);
}

static void put_padded(Buf *b, int64_t value, int width) {
    for (int64_t least = 10; width > 1; width--, least *= 10)
        if (value < least) {
            while (--width) put_char(b, '0');
            break;
        }
    put_int(b, value);
}

static void put_date(Buf *b, int64_t days) {
    int64_t year, month, day;
    civil(days, &year, &month, &day);
    put_padded(b, year, 4);
    put_char(b, '-');
    put_padded(b, month, 2);
    put_char(b, '-');
    put_padded(b, day, 2);
}

static void put_hours(Buf *b, int64_t seconds, bool with_seconds) {
    put_padded(b, seconds / 3600, 2);
    put_char(b, ':');
    put_padded(b, seconds / 60 % 60, 2);
    if (!with_seconds) return;
    put_char(b, ':');
    put_padded(b, seconds % 60, 2);
}

static void put_moment(Buf *b, const Moment *m) {
    put_date(b, m->days);
    if (!m->has_time) return;
    put_char(b, 'T');
    put_hours(b, m->second, true);
    put(b, m->fraction, m->fraction_size);
    if (!m->has_zone) return;
    if (m->zone_s == 0) {
        put_char(b, 'Z');
    } else {
        put_char(b, m->zone_s < 0 ? '-' : '+');
        put_hours(b, m->zone_s < 0 ? -m->zone_s : m->zone_s, false);
    }
}

static int64_t unix_s(const Moment *m) { return m->days * 86400 + m->second - m->zone_s; }

int main(void) {
    const Json *in = input();
    Moment m = need_moment(in, "date");
    move(&m, in);
    int64_t year, month, day;
    civil(m.days, &year, &month, &day);
    int64_t weekday = (m.days + 3) - 7 * floor_div(m.days + 3, 7); /* 0 is Monday */
    int64_t thursday = m.days - weekday + 3, week_year, ignored;
    civil(thursday, &week_year, &ignored, &ignored); /* ISO 8601: a week is of the year that has its Thursday */
    Buf out = done_begin(), date = {0};
    put_moment(&date, &m);
    done_string(&out, "date", date.at, date.size);
    done_int(&out, "weekday", weekday + 1);
    done_int(&out, "day_of_year", m.days - days_of(year, 1, 1) + 1);
    done_int(&out, "week", (thursday - days_of(week_year, 1, 1)) / 7 + 1);
    done_int(&out, "week_year", week_year);
    done_bool(&out, "leap", is_leap(year));
    done_int(&out, "unix_s", unix_s(&m));
    if (field(in, "until")) {
        Moment until = need_moment(in, "until");
        if (until.has_zone != m.has_zone) bad_field("until", "with a zone if \"date\" has one, else without");
        done_int(&out, "days", until.days - m.days);
        done_int(&out, "seconds", unix_s(&until) - unix_s(&m));
    }
    return done_end(&out);
}
