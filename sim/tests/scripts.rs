//! The scenario scripts of core: each says what it recorded, none breaks an invariant, and together they produce
//! every reason there is.
//!
//! `UPDATE_SCRIPTS=1 cargo test -p sim --test scripts` records anew. Commit only differences that you understand.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use pgherd_core::reason::Reason;
use sim::script;

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../crates/core/testdata")
}

/// Every script of a directory, in the order of their names.
fn read_all(directory: &Path) -> std::io::Result<BTreeMap<String, String>> {
    let mut scripts = BTreeMap::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "txt")
            && let Some(name) = path.file_stem().and_then(|name| name.to_str())
        {
            scripts.insert(name.to_owned(), std::fs::read_to_string(&path)?);
        }
    }
    Ok(scripts)
}

#[test]
fn every_script_says_what_it_recorded() {
    let update = std::env::var_os("UPDATE_SCRIPTS").is_some();
    let scripts = read_all(&directory()).unwrap();
    assert!(scripts.len() > 20, "only {} scripts were found", scripts.len());
    let (mut produced, mut differing) = (BTreeSet::new(), Vec::new());
    for (name, text) in scripts {
        let played = script::play(&text).unwrap_or_else(|mistake| panic!("{name}.txt: {mistake:?}"));
        assert_eq!(played.violation, None, "{name}.txt");
        produced.extend(played.reasons);
        if played.text != text {
            let line = played.text.lines().zip(text.lines()).position(|(new, old)| new != old);
            differing.push(format!("{name}.txt, line {}", line.map_or(0, |line| line + 1)));
            if update {
                std::fs::write(directory().join(format!("{name}.txt")), &played.text).unwrap();
            }
        }
    }
    assert!(update || differing.is_empty(), "recorded otherwise: {}", differing.join("; "));
    let missing: Vec<_> = Reason::CODES.iter().filter(|code| !produced.contains(*code)).collect();
    assert!(missing.is_empty(), "no script produces {missing:?}");
}

#[test]
fn a_mistake_in_a_script_names_its_line() {
    let mistake = script::play("# nothing\nherd a b c\nrun five\n").err().unwrap();
    assert_eq!((mistake.line, mistake.why.contains("five")), (3, true));
}
