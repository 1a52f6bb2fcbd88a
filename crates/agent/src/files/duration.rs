//! Times as files write them: a whole number with its unit.

use std::time::Duration;

/// For messages.
pub(super) const GRAMMAR: &str = "a whole number with its unit: \"500ms\", \"3s\", \"5min\", \"1h\", \"2d\"";

/// What is wrong with a text, and what was probably meant.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NotATime {
    pub(super) meant: Option<String>,
}

pub(super) fn parse(text: &str) -> Result<Duration, NotATime> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit_ms = match unit {
        "ms" => 1,
        "s" => 1_000,
        "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(NotATime { meant: meant(number, unit.trim()) }),
    };
    // Longer than any time that is meant here, and far from where milliseconds overflow.
    const MAX_DIGITS: usize = 12;
    if digits == 0 || digits > MAX_DIGITS {
        return Err(NotATime { meant: None });
    }
    let number: u64 = number.parse().map_err(|_| NotATime { meant: None })?;
    Ok(Duration::from_millis(number.saturating_mul(unit_ms)))
}

fn meant(number: &str, unit: &str) -> Option<String> {
    let unit = match unit.to_ascii_lowercase().as_str() {
        "ms" | "msec" | "millis" | "milliseconds" => "ms",
        "s" | "sec" | "secs" | "second" | "seconds" => "s",
        "m" | "min" | "mins" | "minute" | "minutes" => "min",
        "h" | "hr" | "hour" | "hours" => "h",
        "d" | "day" | "days" => "d",
        _ => return None,
    };
    (!number.is_empty()).then(|| format!("{number}{unit}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_whole_numbers_with_units() {
        let right = [
            ("500ms", 500),
            ("0s", 0),
            ("3s", 3_000),
            ("5min", 300_000),
            ("1h", 3_600_000),
            ("2d", 172_800_000),
        ];
        for (text, ms) in right {
            assert_eq!(parse(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        let wrong = [
            ("5m", Some("5min")),
            ("5", None),
            ("5 s", Some("5s")),
            ("5 minutes", Some("5min")),
            ("5S", Some("5s")),
            ("", None),
            ("s", None),
            ("1.5s", None),
            ("-1s", None),
            ("1h30min", None),
            ("9999999999999s", None),
            ("٣s", None),
        ];
        for (text, meant) in wrong {
            assert_eq!(parse(text), Err(NotATime { meant: meant.map(str::to_owned) }), "{text}");
        }
        assert!(
            parse("999999999999d").is_ok(),
            "too long a time is refused by its bounds, not by its grammar"
        );
    }
}
