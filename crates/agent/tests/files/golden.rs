//! Each `testdata/files/NAME.toml` is read, and what is said about it is compared with `NAME.txt`: the files
//! are the manual of the messages. `PGHERD_UPDATE_GOLDEN=1` writes what is said instead of comparing.

use std::path::{Path, PathBuf};

use pgherd_agent::files::agent::AgentFile;
use pgherd_agent::files::{Findings, herd};

fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/files")
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn compare(recorded: &Path, now: &str) {
    if std::env::var_os("PGHERD_UPDATE_GOLDEN").is_some() {
        return std::fs::write(recorded, now).unwrap();
    }
    let before = std::fs::read_to_string(recorded).unwrap_or_default();
    assert!(
        before == now,
        "{} differs; if what follows is right, set PGHERD_UPDATE_GOLDEN=1 and look at the diff\n\n{now}",
        recorded.display()
    );
}

fn findings(path: &Path) -> Findings {
    let name = path.file_name().unwrap().to_str().unwrap();
    let text = std::fs::read_to_string(path).unwrap();
    if name.starts_with("agent-") {
        return AgentFile::read(name, &text).err().unwrap_or_default();
    }
    match herd::read(name, &text) {
        Ok(herd) => herd.warnings,
        Err(findings) => findings,
    }
}

#[test]
fn bad_files_get_their_recorded_findings() {
    let mut seen = 0;
    for entry in std::fs::read_dir(testdata()).unwrap() {
        let path = entry.unwrap().path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("toml") => {}
            Some("txt") => {
                assert!(path.with_extension("toml").exists(), "{} belongs to no file", path.display());
                continue;
            }
            _ => continue,
        }
        let findings = findings(&path);
        assert!(!findings.is_empty(), "{} is there to be found fault with", path.display());
        compare(&path.with_extension("txt"), &findings.to_string());
        seen += 1;
    }
    assert!(seen >= 10, "only {seen} files in {}", testdata().display());
}

#[test]
fn findings_as_json_tell_the_same() {
    let found = findings(&testdata().join("keys.toml"));
    let json = serde_json::to_value(&found).unwrap();
    let first = &json[0];
    assert_eq!(
        *first,
        serde_json::json!({
            "severity": "error", "kind": "unknown-key", "file": "keys.toml", "line": 2, "column": 1, "width": 3,
            "text": "nam = \"shop\"", "message": "unknown key \"nam\"", "hint": "did you mean \"name\"?",
            "related": null,
        })
    );
    assert_eq!(json.as_array().unwrap().len(), found.0.len());
}

#[test]
fn the_examples_are_valid_and_without_doubt() {
    let mut seen = 0;
    for entry in std::fs::read_dir(workspace().join("examples")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        match herd::read(path.to_str().unwrap(), &text) {
            Ok(herd) => assert!(herd.warnings.is_empty(), "{}", herd.warnings),
            Err(findings) => panic!("{findings}"),
        }
        seen += 1;
    }
    assert!(seen >= 2, "the examples are gone");
}

#[test]
fn the_reference_page_is_what_the_program_reads_by() {
    compare(&workspace().join("docs/reference/herd-file.md"), &herd::reference());
}
