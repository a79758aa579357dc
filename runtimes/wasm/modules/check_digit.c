/* Whether "text" is well formed and its check digits are right. "kind": luhn (numbers of payment cards and the like), iban, isbn (10 or
 * 13 digits), ean (8, 12 or 13 digits) or credit_card, which also names the issuer. Spaces and dashes are left out. Gives "valid", the
 * plain "text", and the "expected" check digits where they can be computed. That such a number was ever issued is another question. */
#include "cargo.h"

static Buf plain;

static bool all_digits(size_t from, size_t to) {
    for (size_t i = from; i < to; i++)
        if (plain.at[i] < '0' || plain.at[i] > '9') return false;
    return true;
}

static int finish(bool valid, const char *expected, const char *more_key, const char *more) {
    Buf out = done_begin();
    done_bool(&out, "valid", valid);
    done_string(&out, "text", plain.at, plain.size);
    if (expected) done_string(&out, "expected", expected, strlen(expected));
    if (more) done_string(&out, more_key, more, strlen(more));
    return done_end(&out);
}

static int finish_digit(char expected, const char *more_key, const char *more) {
    char text[2] = {expected, 0};
    return finish(plain.at[plain.size - 1] == expected, text, more_key, more);
}

/* ISO/IEC 7812-1: from the right every second digit counts double, without its carry. */
static char luhn_digit(void) {
    int sum = 0;
    for (size_t i = 0; i + 1 < plain.size; i++) {
        int digit = plain.at[plain.size - 2 - i] - '0';
        sum += i % 2 ? digit : digit * 2 - (digit > 4 ? 9 : 0);
    }
    return (char)('0' + (10 - sum % 10) % 10);
}

/* GS1: from the right every second digit counts three times. */
static char ean_digit(void) {
    int sum = 0;
    for (size_t i = 0; i + 1 < plain.size; i++) sum += (plain.at[plain.size - 2 - i] - '0') * (i % 2 ? 1 : 3);
    return (char)('0' + (10 - sum % 10) % 10);
}

static int luhn(void) {
    if (plain.size < 2 || !all_digits(0, plain.size)) return finish(false, NULL, NULL, NULL);
    return finish_digit(luhn_digit(), NULL, NULL);
}

static int number_at_front(int count) {
    int value = 0;
    for (int i = 0; i < count; i++) value = 10 * value + plain.at[i] - '0';
    return value;
}

static const char *issuer(void) {
    size_t size = plain.size;
    int two = number_at_front(2), four = number_at_front(4);
    if (plain.at[0] == '4' && (size == 13 || size == 16 || size == 19)) return "visa";
    if (size == 16 && ((two >= 51 && two <= 55) || (four >= 2221 && four <= 2720))) return "mastercard";
    if (size == 15 && (two == 34 || two == 37)) return "american express";
    if (size == 14 && (two == 36 || two == 38 || (four >= 3000 && four <= 3059))) return "diners club";
    if (size >= 16 && (four == 6011 || two == 65 || (four >= 6440 && four <= 6499))) return "discover";
    if (size >= 16 && four >= 3528 && four <= 3589) return "jcb";
    return "unknown";
}

static int credit_card(void) {
    if (plain.size < 12 || plain.size > 19 || !all_digits(0, plain.size)) return finish(false, NULL, NULL, NULL);
    return finish_digit(luhn_digit(), "issuer", issuer());
}

static int ean(void) {
    bool sized = plain.size == 8 || plain.size == 12 || plain.size == 13;
    if (!sized || !all_digits(0, plain.size)) return finish(false, NULL, NULL, NULL);
    return finish_digit(ean_digit(), NULL, NULL);
}

static int isbn(void) {
    bool is_long = plain.size == 13 && all_digits(0, 13) && (number_at_front(3) == 978 || number_at_front(3) == 979);
    if (is_long) return finish_digit(ean_digit(), NULL, NULL);
    if (plain.size != 10 || !all_digits(0, 9)) return finish(false, NULL, NULL, NULL);
    int sum = 0;
    for (int i = 0; i < 9; i++) sum += (10 - i) * (plain.at[i] - '0');
    int digit = (11 - sum % 11) % 11;
    return finish_digit(digit == 10 ? 'X' : (char)('0' + digit), NULL, NULL);
}

/* ISO 13616: length by country, from the registry of SWIFT. */
static const char lengths[] =
    "AD24AE23AL28AT20AZ28BA20BE16BG22BH22BI27BR29BY28CH21CR22CY28CZ24DE22DJ27DK18DO28EE20EG29ES24FI18FK18FO18FR27GB22GE22GI23GL18GR27GT28"
    "HR21HU28IE22IL23IQ23IS26IT27JO30KW30KZ20LB28LC32LI21LT20LU20LV21LY25MC27MD24ME22MK19MN20MR27MT31MU30NI28NL18NO15OM23PK24PL28PS29PT25"
    "QA29RO24RS22RU33SA24SC31SD18SE24SI19SK24SM27SO23ST25SV28TL23TN24TR26UA29VA22VG24XK20YE30";

static bool has_length(void) {
    for (const char *at = lengths; *at; at += 4)
        if (!memcmp(at, plain.at, 2)) return plain.size == (size_t)(10 * (at[2] - '0') + at[3] - '0');
    return false;
}

/* ISO 7064, mod 97-10, of the rest, the country and 00. */
static int iban_rest(void) {
    int rest = 0;
    for (size_t i = 0; i < plain.size; i++) {
        size_t from = (i + 4) % plain.size;
        char c = from == 2 || from == 3 ? '0' : plain.at[from];
        rest = c <= '9' ? (10 * rest + c - '0') % 97 : (100 * rest + c - 'A' + 10) % 97;
    }
    return rest;
}

static int iban(void) {
    bool formed = plain.size > 4 && has_length() && all_digits(2, 4);
    for (size_t i = 0; formed && i < plain.size; i++) formed = all_digits(i, i + 1) || (plain.at[i] >= 'A' && plain.at[i] <= 'Z');
    if (!formed) return finish(false, NULL, NULL, NULL);
    int check = 98 - iban_rest();
    char expected[3] = {(char)('0' + check / 10), (char)('0' + check % 10), 0}, country[3] = {plain.at[0], plain.at[1], 0};
    return finish(!memcmp(plain.at + 2, expected, 2), expected, "country", country);
}

int main(void) {
    const Json *in = input(), *text = need_string(in, "text");
    const char *kind = need_string(in, "kind")->text;
    for (size_t i = 0; i < text->size; i++) {
        char c = text->text[i];
        if (c != ' ' && c != '-') put_char(&plain, c >= 'a' && c <= 'z' ? c - 32 : c);
    }
    if (!strcmp(kind, "luhn")) return luhn();
    if (!strcmp(kind, "iban")) return iban();
    if (!strcmp(kind, "isbn")) return isbn();
    if (!strcmp(kind, "ean")) return ean();
    if (!strcmp(kind, "credit_card")) return credit_card();
    bad_field("kind", "luhn, iban, isbn, ean or credit_card");
}
