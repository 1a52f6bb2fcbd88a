//! What the agents and PostgreSQL wrote, for failure messages, and the check that nothing unexpected is in it.

use std::path::{Path, PathBuf};

/// So much of the end of each log goes into a failure message.
const TAIL_LINES: usize = 40;

/// All files below `directory` whose name ends in `.log`, sorted.
pub(super) fn below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut to_read = vec![directory.to_owned()];
    while let Some(directory) = to_read.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                to_read.push(path);
            } else if path.extension().is_some_and(|extension| extension == "log") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

pub(super) fn tail(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

/// Lines of an agent's log at ERROR or WARN that contain none of the expected texts.
pub(super) fn unexpected(log: &str, expected: &[&str]) -> Vec<String> {
    log.lines()
        .filter(|line| is_loud(line) && !expected.iter().any(|known| line.contains(known)))
        .map(str::to_owned)
        .collect()
}

/// Whether a line of the agent's log has one of the two levels that a person may have to read: the second
/// word, after the time.
fn is_loud(line: &str) -> bool {
    let plain = without_colour(line);
    let level = plain.split_whitespace().nth(1);
    level.is_some_and(|level| ["ERROR", "WARN"].contains(&level)) || plain.contains("panicked at")
}

fn without_colour(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut rest = line;
    while let Some((before, after)) = rest.split_once('\x1b') {
        plain.push_str(before);
        rest = after.split_once('m').map_or("", |(_, after)| after);
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use super::unexpected;

    #[test]
    fn only_unlisted_lines_of_the_two_loud_levels_are_found() {
        let log = "2026-01-01T00:00:00Z  INFO agent: an ERROR in a text is none\n\
                   2026-01-01T00:00:01Z  WARN agent: the store is slow node=b\n\
                   \x1b[2m2026-01-01T00:00:02Z\x1b[0m \x1b[31mERROR\x1b[0m agent: fsync failed\n\
                   thread 'main' panicked at agent.rs:1\n";
        let found = unexpected(log, &["the store is slow"]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("fsync failed") && found[1].contains("panicked"));
        assert_eq!(unexpected(log, &[]).len(), 3);
    }
}
