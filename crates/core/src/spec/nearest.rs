//! "Did you mean": the word of a list that a mistyped one is most likely to stand for.

/// The closest candidate, if it is close enough to be worth naming: at most a third of its letters differ.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    /// Longer ones are no slip of the finger, and the distance takes time quadratic in the length.
    const MAX_BYTES: usize = 64;
    if word.len() > MAX_BYTES {
        return None;
    }
    let word = word.to_ascii_lowercase();
    let near = |candidate: &&str| {
        let distance = distance(&word, &candidate.to_ascii_lowercase());
        (distance <= (candidate.len() / 3).max(1)).then_some(distance)
    };
    candidates.into_iter().filter_map(|it| near(&it).map(|distance| (distance, it))).min().map(|(_, it)| it)
}

/// Insertions, deletions, substitutions and swaps of neighbours that turn `from` into `to`.
fn distance(from: &str, to: &str) -> usize {
    let (from, to): (Vec<char>, Vec<char>) = (from.chars().collect(), to.chars().collect());
    let mut rows = vec![vec![0; to.len() + 1]; from.len() + 1];
    for (row, cells) in rows.iter_mut().enumerate() {
        cells[0] = row;
    }
    for (column, cell) in rows[0].iter_mut().enumerate() {
        *cell = column;
    }
    for row in 1..=from.len() {
        for column in 1..=to.len() {
            let same = from[row - 1] == to[column - 1];
            let mut best = (rows[row - 1][column] + 1)
                .min(rows[row][column - 1] + 1)
                .min(rows[row - 1][column - 1] + usize::from(!same));
            let swapped =
                row > 1 && column > 1 && from[row - 1] == to[column - 2] && from[row - 2] == to[column - 1];
            if swapped {
                best = best.min(rows[row - 2][column - 2] + 1);
            }
            rows[row][column] = best;
        }
    }
    rows[from.len()][to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_are_recognised_and_strangers_are_not() {
        let keys = ["durability", "degrade_after", "needed", "node", "name", "port"];
        let cases = [
            ("durabilty", Some("durability")),
            ("degradeafter", Some("degrade_after")),
            ("nodes", Some("node")),
            ("prot", Some("port")),
            ("Name", Some("name")),
            ("replication", None),
            ("", None),
            ("x", None),
        ];
        for (typed, meant) in cases {
            assert_eq!(nearest(typed, keys), meant, "{typed}");
        }
        assert_eq!(nearest(&"x".repeat(1_000_000), keys), None);
    }
}
