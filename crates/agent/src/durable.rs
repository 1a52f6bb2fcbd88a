//! What this node's own disk remembers between two lives of its agent: `<state_dir>/node.json`.
//!
//! Each change is written to a temporary file, synced, renamed and the directory synced before anything is
//! done that relies on it: a vote that was sent and then forgotten would let this node follow the old term
//! again. The file is written by one task, so the newest content is the whole truth.
//!
//! Hazard: a lost or rolled back file un-seals a voter. A file that cannot be read stops the agent instead of
//! being taken for an empty one.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use pgherd_core::observation::Durable;
use pgherd_core::record::Moment;
use pgherd_core::types::{Member, Term, Timeline};
use serde::{Deserialize, Serialize};

/// The form of the file; a later one is refused, not guessed.
const FORMAT: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum DurableError {
    #[error("{doing} {path}")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("{path} does not read as this node's state: {why}")]
    Malformed { path: PathBuf, why: String },
}

/// The stored form, apart from the type that decisions use.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: u32,
    member: Option<Member>,
    term: Term,
    sealed: Option<Term>,
    adopted: BTreeMap<u32, Term>,
    promoting: Option<(Term, Timeline)>,
    rebuilding: bool,
    /// A version that knows nothing of it refuses the file, and neither follows nor votes with what is held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    held: Option<Moment>,
}

/// The file and its present content.
#[derive(Debug)]
pub(crate) struct DurableFile {
    path: PathBuf,
    now: Durable,
}

impl DurableFile {
    /// Reads the file; a directory without one is that of a node that never took part in anything.
    pub(crate) fn open(state_dir: &Path) -> Result<DurableFile, DurableError> {
        let path = state_dir.join("node.json");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(DurableFile { path, now: Durable::default() });
            }
            Err(source) => return Err(DurableError::Io { doing: "read", path, source }),
        };
        let malformed = |why: String| DurableError::Malformed { path: path.clone(), why };
        let stored: Stored = serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
        if stored.format != FORMAT {
            return Err(malformed(format!("format {}, this program reads {FORMAT}", stored.format)));
        }
        let adopted = stored.adopted.into_iter().map(|(timeline, term)| (Timeline(timeline), term)).collect();
        let now = Durable {
            member: stored.member,
            term: stored.term,
            sealed: stored.sealed,
            adopted,
            promoting: stored.promoting,
            rebuilding: stored.rebuilding,
            held: stored.held,
        };
        Ok(DurableFile { path, now })
    }

    pub(crate) fn now(&self) -> &Durable {
        &self.now
    }

    /// Makes `change` durable; when this returns, it survives a loss of power.
    pub(crate) fn change(&mut self, change: impl FnOnce(&mut Durable)) -> Result<(), DurableError> {
        let mut next = self.now.clone();
        change(&mut next);
        if next == self.now {
            return Ok(());
        }
        let stored = Stored {
            format: FORMAT,
            member: next.member.clone(),
            term: next.term,
            sealed: next.sealed,
            adopted: next.adopted.iter().map(|(timeline, term)| (timeline.0, *term)).collect(),
            promoting: next.promoting,
            rebuilding: next.rebuilding,
            held: next.held.clone(),
        };
        let text = serde_json::to_vec_pretty(&stored)
            .map_err(|error| DurableError::Malformed { path: self.path.clone(), why: error.to_string() })?;
        write_synced(&self.path, &text, 0o600).map_err(|source| DurableError::Io {
            doing: "write",
            path: self.path.clone(),
            source,
        })?;
        self.now = next;
        Ok(())
    }
}

/// Replaces a file so that after a crash either the old or the whole new content is there.
pub(crate) fn write_synced(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    fs::File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_there_after_a_restart_and_garbage_is_not_taken_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = DurableFile::open(dir.path()).unwrap();
        assert_eq!(file.now(), &Durable::default());
        file.change(|durable| {
            durable.member = Some("b_7".parse().unwrap());
            durable.sealed = Some(Term(4));
            durable.term = Term(4);
            durable.adopted.insert(Timeline(3), Term(2));
            durable.promoting = Some((Term(4), Timeline(5)));
        })
        .unwrap();
        let again = DurableFile::open(dir.path()).unwrap();
        assert_eq!(again.now(), file.now());

        // As this version writes it, every later one has to read it.
        let stored = r#"{
  "format": 1,
  "member": "b_7",
  "term": 4,
  "sealed": 4,
  "adopted": {
    "3": 2
  },
  "promoting": [
    4,
    5
  ],
  "rebuilding": false
}"#;
        assert_eq!(fs::read_to_string(dir.path().join("node.json")).unwrap(), stored);

        let moment = Moment {
            backup: "20261120T205454".to_owned(),
            timeline: Timeline(3),
            end: "0/4000000".parse().unwrap(),
            along: Timeline(5),
        };
        file.change(|durable| durable.held = Some(moment)).unwrap();
        assert_eq!(DurableFile::open(dir.path()).unwrap().now(), file.now());

        fs::write(dir.path().join("node.json"), "{}").unwrap();
        assert!(matches!(DurableFile::open(dir.path()), Err(DurableError::Malformed { .. })));
    }
}
