//! Numbers as people read them.

const NAMES: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];

/// `0 B`, `16 MiB`, `1.5 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    let (mut value, mut unit) = (count as f64, 0);
    while value >= 1024.0 && unit + 1 < NAMES.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value.fract() < 0.05 || value >= 100.0 {
        format!("{value:.0} {}", NAMES[unit])
    } else {
        format!("{value:.1} {}", NAMES[unit])
    }
}

/// `12 ms`, `3.4 s`, `5 min`, `2 h`.
pub(crate) fn span(ms: u64) -> String {
    match ms {
        0..=999 => format!("{ms} ms"),
        1_000..=59_999 => format!("{:.1} s", ms as f64 / 1_000.0),
        60_000..=3_599_999 => format!("{} min", ms / 60_000),
        _ => format!("{} h", ms / 3_600_000),
    }
}

/// `1 node`, `3 nodes`.
pub(crate) fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

/// `a`, `a and b`, `a, b and c`.
pub(crate) fn listed(names: &[String], between: &str) -> String {
    match names {
        [] => String::new(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} {between} {last}", most.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_spans() {
        assert_eq!(
            [0, 1023, 1024, 1536, 16 << 20, 3 << 30].map(bytes),
            ["0 B", "1023 B", "1 KiB", "1.5 KiB", "16 MiB", "3 GiB"]
        );
        assert_eq!(
            [0, 999, 1_000, 59_999, 60_000, 7_200_000].map(span),
            ["0 ms", "999 ms", "1.0 s", "60.0 s", "1 min", "2 h"]
        );
    }

    #[test]
    fn names_in_a_sentence() {
        let names =
            |all: &[&str]| listed(&all.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>(), "and");
        assert_eq!([names(&[]), names(&["a"]), names(&["a", "b", "c"])], ["", "a", "a, b and c"]);
    }
}
