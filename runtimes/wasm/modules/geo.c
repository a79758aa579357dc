/* Places on Earth. "points" is an array of [latitude, longitude] in degrees; gives the "length_m" of the way through them (great circles
 * on a sphere of 6,371,008.8 m, by the haversine formula), the "legs_m", and the geohash of each with "precision" characters (1 to 12,
 * default 9). "geohash" instead of points gives its middle and its box. */
#include "number.h"

#define RADIUS_M 6371008.8 /* the mean of the Earth's axes, IUGG */
#define RADIANS (M_PI / 180)

static const char digits[] = "0123456789bcdefghjkmnpqrstuvwxyz";
static const char must[] = "an array of [latitude, longitude] within 90 and 180 degrees";

typedef struct {
    double latitude, longitude;
} Point;

static Point point_of(const Json *pair) {
    Numbers numbers = numbers_of(pair, "points", must);
    if (numbers.size != 2 || fabs(numbers.at[0]) > 90 || fabs(numbers.at[1]) > 180) bad_field("points", must);
    return (Point){numbers.at[0], numbers.at[1]};
}

static double distance_m(Point a, Point b) {
    double up = sin((b.latitude - a.latitude) * RADIANS / 2), along = sin((b.longitude - a.longitude) * RADIANS / 2);
    double h = up * up + cos(a.latitude * RADIANS) * cos(b.latitude * RADIANS) * along * along;
    return 2 * RADIUS_M * asin(sqrt(h < 1 ? h : 1));
}

/* Halves the range and tells in which half the value is. */
static int half(double *low, double *high, double value) {
    double middle = (*low + *high) / 2;
    if (value >= middle) {
        *low = middle;
        return 1;
    }
    *high = middle;
    return 0;
}

static void put_geohash(Buf *b, Point p, int64_t precision) {
    double south = -90, north = 90, west = -180, east = 180;
    char text[12];
    for (int i = 0; i < 5 * precision; i++) {
        int bit = i % 2 ? half(&south, &north, p.latitude) : half(&west, &east, p.longitude);
        if (i % 5 == 0) text[i / 5] = 0;
        text[i / 5] = (char)(text[i / 5] << 1 | bit);
    }
    for (int i = 0; i < precision; i++) text[i] = digits[(int)text[i]];
    put_string(b, text, (size_t)precision);
}

static int box_of(const Json *text) {
    double south = -90, north = 90, west = -180, east = 180;
    if (!text->size || text->size > 12) bad_field("geohash", "1 to 12 characters");
    for (size_t i = 0; i < text->size; i++) {
        const char *found = text->text[i] ? strchr(digits, lower(text->text[i])) : NULL;
        if (!found) bad_field("geohash", "of 0 to 9 and the letters without a, i, l and o");
        for (int bit = 4; bit >= 0; bit--) {
            bool is_high = (found - digits) >> bit & 1, is_longitude = (i * 5 + 4 - (size_t)bit) % 2 == 0;
            double *low = is_longitude ? &west : &south, *high = is_longitude ? &east : &north;
            *(is_high ? low : high) = (*low + *high) / 2;
        }
    }
    Buf out = done_begin();
    done_number(&out, "latitude", (south + north) / 2);
    done_number(&out, "longitude", (west + east) / 2);
    done_number(&out, "south", south);
    done_number(&out, "north", north);
    done_number(&out, "west", west);
    done_number(&out, "east", east);
    return done_end(&out);
}

int main(void) {
    const Json *in = input();
    if (field(in, "geohash")) return box_of(need_string(in, "geohash"));
    const Json *points = field(in, "points");
    int64_t precision = int_or(in, "precision", 9, 1, 12);
    if (!points || points->kind != JSON_ARRAY || !points->size) bad_field("points", must);
    Buf legs = {0}, hashes = {0};
    double length_m = 0;
    Point last = {0, 0};
    for (const Json *pair = points->first; pair; pair = pair->next) {
        Point here = point_of(pair);
        if (pair != points->first) {
            double leg_m = round(distance_m(last, here) * 1000) / 1000; /* the sphere is no nearer to the Earth than that */
            length_m += leg_m;
            if (legs.size) put_char(&legs, ',');
            put_number(&legs, leg_m);
            put_char(&hashes, ',');
        }
        put_geohash(&hashes, here, precision);
        last = here;
    }
    Buf out = done_begin();
    done_number(&out, "length_m", round(length_m * 1000) / 1000);
    done_key(&out, "legs_m");
    put_char(&out, '[');
    put(&out, legs.at, legs.size);
    put_text(&out, "]");
    done_key(&out, "geohashes");
    put_char(&out, '[');
    put(&out, hashes.at, hashes.size);
    put_char(&out, ']');
    return done_end(&out);
}
