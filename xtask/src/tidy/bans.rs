//! Words that must not stand in some code, with what to use instead.

use super::Complaint;
use super::source::Source;

struct Ban {
    words: &'static [&'static str],
    /// Where the ban holds, by the beginning of a path.
    within: &'static [&'static str],
    /// Where it does not, for a reason that stands there.
    except: &'static [&'static str],
    code: Code,
    why: &'static str,
}

#[derive(Clone, Copy, PartialEq)]
enum Code {
    All,
    Shipped,
    Tests,
}

const PURE: &[&str] = &["crates/core/src/", "sim/src/"];
/// The command line of the simulator: it starts workers, measures itself and prints.
const SIM_MAIN: &str = "sim/src/main.rs";

const BANS: &[Ban] = &[
    Ban {
        words: &["std::time::Instant", "Instant::now", "SystemTime"],
        within: PURE,
        except: &[SIM_MAIN],
        code: Code::All,
        why: "deciding code gets its time as an argument, or a run could not be repeated",
    },
    Ban {
        words: &["HashMap", "HashSet", "RandomState"],
        within: PURE,
        except: &[],
        code: Code::All,
        why: "its order differs from run to run; BTreeMap and BTreeSet keep theirs",
    },
    Ban {
        words: &["tokio", "async_std", "futures_util", "std::thread", "std::sync::mpsc", "Mutex", "RwLock"],
        within: PURE,
        except: &[SIM_MAIN],
        code: Code::All,
        why: "deciding code is synchronous and alone; what runs beside it belongs to agent",
    },
    Ban {
        words: &["std::fs", "std::net", "std::env", "std::process", "std::io", "std::os"],
        within: PURE,
        except: &[SIM_MAIN],
        code: Code::Shipped,
        why: "deciding code has no input or output; what it needs is in the observation",
    },
    Ban {
        words: &["rand", "getrandom", "fastrand"],
        within: PURE,
        except: &[],
        code: Code::All,
        why: "randomness comes from one seed, or a failure could not be replayed",
    },
    Ban {
        words: &["println!", "print!", "eprintln!", "eprint!"],
        within: &["crates/", "fuzz/src/", "sim/src/", "testkit/src/"],
        except: &["crates/cli/", "fuzz/src/main.rs", SIM_MAIN, "testkit/src/bin/", "testkit/src/main.rs"],
        code: Code::Shipped,
        why: "only command lines print; everybody else returns a value or uses tracing",
    },
    Ban {
        words: &["dbg!", "todo!", "unimplemented!"],
        within: &[""],
        except: &[],
        code: Code::All,
        why: "what is merged is done",
    },
    Ban {
        words: &["thread::sleep", "time::sleep", "sleep_until"],
        within: &[""],
        // Where waiting for a condition is built, once.
        except: &["testkit/src/wait.rs"],
        code: Code::Tests,
        why: "a test waits for a condition with a deadline; where a pause is meant, the line above says why: // sleep: …",
    },
    Ban {
        words: &[
            "tokio::time::sleep",
            "tokio::time::sleep_until",
            "tokio::time::timeout",
            "tokio::time::timeout_at",
            "tokio::time::interval",
            "tokio::time::interval_at",
            // Nobody needs anything else of it but Instant.
            "tokio::time::{",
        ],
        within: &["crates/proxy/src/"],
        except: &["crates/proxy/src/timer.rs"],
        code: Code::Shipped,
        why: "the runtimes of the proxy's workers have no timers, and these panic there; crate::timer has the same",
    },
    Ban {
        words: &["#[ignore]", "#[should_panic]"],
        within: &[""],
        except: &[],
        code: Code::All,
        why: "an ignored test is forgotten (say #[ignore = \"why\"]), and a panic that is expected is not told apart",
    },
];

/// Marks of unfinished work, wherever they stand; spelt so that this file passes.
const MARKS: &[&str] = &[concat!("FIX", "ME"), concat!("TO", "DO"), concat!("XX", "X")];

pub(super) fn check(source: &Source<'_>) -> Vec<Complaint> {
    let mut complaints = Vec::new();
    let path = source.path();
    let begins = |list: &[&str]| list.iter().any(|begin| path.starts_with(begin));
    for ban in BANS.iter().filter(|ban| begins(ban.within) && !begins(ban.except)) {
        for word in ban.words {
            for at in source.find(word) {
                let test = source.is_test(at) || path.starts_with("testkit/");
                let excused = ban.code == Code::Tests && is_excused(source, at);
                let meant = match ban.code {
                    _ if excused => false,
                    Code::All => true,
                    Code::Shipped => !source.is_test(at),
                    Code::Tests => test,
                };
                if meant {
                    complaints.push(source.file.complaint(
                        source.line(at),
                        format!("{word} stands here"),
                        ban.why,
                    ));
                }
            }
        }
    }
    for (index, line) in source.file.text.lines().enumerate() {
        let words = || line.split(|letter: char| !letter.is_ascii_alphanumeric());
        for mark in MARKS.iter().filter(|mark| words().any(|word| word == **mark)) {
            let why = "what is merged is done; what is missing is in the issue tracker";
            complaints.push(source.file.complaint(index + 1, format!("{mark} stands here"), why));
        }
    }
    complaints
}

/// A pause that is meant says why, at its line or right above: `// sleep: between two polls`.
fn is_excused(source: &Source<'_>, at: usize) -> bool {
    let number = source.line(at);
    let mut lines =
        source.file.text.lines().skip(number.saturating_sub(2)).take(if number == 1 { 1 } else { 2 });
    lines.any(|line| line.split_once("// sleep: ").is_some_and(|(_, why)| !why.trim().is_empty()))
}

#[cfg(test)]
mod tests {
    use super::super::File;
    use super::*;

    fn complaints(path: &str, text: &str) -> Vec<String> {
        let file = File { path: path.to_owned(), text: text.to_owned() };
        check(&Source::new(&file)).into_iter().map(|complaint| complaint.what).collect()
    }

    #[test]
    fn each_ban_finds_its_words_and_nothing_else() {
        for (path, text, found) in [
            ("crates/core/src/ha.rs", "let now = Instant::now();", 1),
            ("crates/core/src/ha.rs", "use std::time::{Duration, SystemTime};", 1),
            ("crates/core/src/ha.rs", "fn at(now: Instant) {} // Instant::now", 0),
            ("crates/core/src/ha.rs", "use std::collections::HashMap;", 1),
            ("crates/core/src/ha.rs", "#[cfg(test)]\nmod tests { fn t() { std::fs::read(x); } }", 0),
            ("crates/core/src/ha.rs", "std::fs::read(x);", 1),
            ("sim/src/main.rs", "std::thread::spawn(x); println!();", 0),
            ("sim/src/world.rs", "std::thread::spawn(x); println!();", 2),
            ("crates/agent/src/a.rs", "println!();", 1),
            ("crates/agent/src/a.rs", "\"println!()\"", 0),
            ("crates/cli/src/a.rs", "println!();", 0),
            ("crates/agent/src/a.rs", "tokio::time::sleep(x).await;", 0),
            ("crates/agent/tests/it/main.rs", "tokio::time::sleep(x).await;", 1),
            ("crates/agent/src/a.rs", "#[cfg(test)] mod tests { fn t() { std::thread::sleep(x); } }", 1),
            ("crates/proxy/src/a.rs", "tokio::time::timeout(x, y); tokio::time::sleep(x);", 2),
            ("crates/proxy/src/a.rs", "use tokio::time::{Instant, timeout};", 1),
            ("crates/proxy/src/a.rs", "use tokio::time::Instant; timer::sleep(x);", 0),
            ("crates/proxy/src/timer.rs", "tokio::time::timeout(x, y)", 0),
            ("testkit/src/net.rs", "std::thread::sleep(x);", 1),
            ("testkit/src/net.rs", "// sleep: between two polls\nstd::thread::sleep(x);", 0),
            ("testkit/src/net.rs", "std::thread::sleep(x); // sleep: the fault itself", 0),
            ("testkit/src/net.rs", "// sleep: \nstd::thread::sleep(x);", 1),
            ("testkit/src/net.rs", "// sleep: why\nx();\nstd::thread::sleep(x);", 1),
            ("testkit/src/wait.rs", "std::thread::sleep(x);", 0),
            ("crates/api/src/a.rs", concat!("to", "do!()"), 1),
            ("crates/api/src/a.rs", concat!("// FIX", "ME: later"), 1),
            ("crates/api/src/a.rs", "#[ignore] fn x() {}", 1),
            ("crates/api/src/a.rs", "#[ignore = \"needs an hour\"] fn x() {}", 0),
        ] {
            assert_eq!(complaints(path, text).len(), found, "{path}: {text}: {:?}", complaints(path, text));
        }
    }
}
