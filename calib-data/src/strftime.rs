//! `strftime` for chat templates, from a given second and never from a clock.

use std::fmt::Write;

/// Seconds from 1970-01-01T00:00:00Z to 2024-07-26T00:00:00Z, the date that the Llama 3 templates
/// fall back to. Templates that print the date must not make calibration depend on the day.
pub(crate) const DEFAULT_NOW: i64 = 1_721_952_000;

const DAYS: [&str; 7] = [
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// The second `unix` (UTC) in `format`, or the first directive that is not known.
///
/// Known: `%Y %y %m %d %e %-d %-m %b %B %a %A %j %H %M %S %p %I %F %T %Z %z %%`.
pub(crate) fn strftime(unix: i64, format: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive: String = chars.next().into_iter().collect();
        if directive == "-" {
            directive.extend(chars.next());
        }
        put(&mut out, unix, &directive).ok_or_else(|| format!("%{directive}"))?;
    }
    Ok(out)
}

/// Appends one directive's text; `None` if it is not known.
fn put(out: &mut String, unix: i64, directive: &str) -> Option<()> {
    let (days, second) = (unix.div_euclid(86_400), unix.rem_euclid(86_400));
    let (year, month, day) = civil(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let name = MONTHS[month as usize - 1];
    // 1970-01-01 was a Thursday.
    let weekday = DAYS[(days + 4).rem_euclid(7) as usize];
    match directive {
        "Y" => write!(out, "{year}"),
        "y" => write!(out, "{:02}", year.rem_euclid(100)),
        "m" => write!(out, "{month:02}"),
        "-m" => write!(out, "{month}"),
        "d" => write!(out, "{day:02}"),
        "e" => write!(out, "{day:2}"),
        "-d" => write!(out, "{day}"),
        "B" => write!(out, "{name}"),
        "b" => write!(out, "{}", &name[..3]),
        "A" => write!(out, "{weekday}"),
        "a" => write!(out, "{}", &weekday[..3]),
        "j" => write!(out, "{:03}", days - days_before(year) + 1),
        "H" => write!(out, "{hour:02}"),
        "I" => write!(out, "{:02}", (hour + 11) % 12 + 1),
        "p" => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
        "M" => write!(out, "{minute:02}"),
        "S" => write!(out, "{:02}", second % 60),
        "F" => write!(out, "{year}-{month:02}-{day:02}"),
        "T" => write!(out, "{hour:02}:{minute:02}:{:02}", second % 60),
        "Z" => write!(out, "UTC"),
        "z" => write!(out, "+0000"),
        "%" => write!(out, "%"),
        _ => return None,
    }
    .ok()
}

/// Days from 1970-01-01 to the first of January of `year`, Gregorian.
fn days_before(year: i64) -> i64 {
    let before = year - 1;
    let leap_days = before.div_euclid(4) - before.div_euclid(100) + before.div_euclid(400);
    // 719162 days lie between 0001-01-01 and 1970-01-01.
    before * 365 + leap_days - 719_162
}

/// Year, month (1…12) and day (1…31) of the day `days` after 1970-01-01.
fn civil(days: i64) -> (i64, i64, i64) {
    // 400 years are 146097 days: a first guess that is at most one year off.
    let guess = 1970 + (days * 400).div_euclid(146_097);
    let mut year = guess + 1;
    while days_before(year) > days {
        year -= 1;
    }
    let leap = days_before(year + 1) - days_before(year) == 366;
    let lengths = [
        31,
        28 + i64::from(leap),
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ];
    let mut rest = days - days_before(year);
    let mut month = 0;
    while rest >= lengths[month] {
        rest -= lengths[month];
        month += 1;
    }
    (year, month as i64 + 1, rest + 1)
}

#[cfg(test)]
mod tests {
    use super::{DEFAULT_NOW, strftime};

    #[test]
    fn known_dates() {
        let check = |unix, format, expected: &str| {
            assert_eq!(strftime(unix, format).unwrap(), expected, "{unix}");
        };
        check(DEFAULT_NOW, "%d %b %Y", "26 Jul 2024");
        check(
            DEFAULT_NOW,
            "%A, %B %-d (%j) %H:%M:%S %I %p",
            "Friday, July 26 (208) 00:00:00 12 AM",
        );
        check(0, "%F %T %a %y", "1970-01-01 00:00:00 Thu 70");
        check(-1, "%F %T", "1969-12-31 23:59:59");
        // Leap day of a year divisible by 400, last second of a leap year, a common century.
        check(951_827_696, "%F %T", "2000-02-29 12:34:56");
        check(1_735_689_599, "%F %T %j", "2024-12-31 23:59:59 366");
        check(4_107_542_400, "%F %e", "2100-03-01  1");
        check(13_574_563_200, "100%% %F", "100% 2400-02-29");
    }

    #[test]
    fn unknown_directives_are_named() {
        assert_eq!(strftime(0, "%Y %Q"), Err("%Q".to_owned()));
        assert_eq!(strftime(0, "%"), Err("%".to_owned()));
    }
}
