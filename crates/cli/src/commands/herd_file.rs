//! Which herd file is meant, and its text.

use std::path::{Path, PathBuf};

use crate::args::Global;
use crate::failure::Failure;

const NAME: &str = "herd.toml";

/// `--herd`, else `herd.toml` here, else the one in the herd's directory.
pub(super) fn find(global: &Global) -> Result<PathBuf, Failure> {
    if let Some(named) = &global.herd {
        return Ok(named.clone());
    }
    let in_dir = global.dir()?.join(NAME);
    let found = [PathBuf::from(NAME), in_dir.clone()].into_iter().find(|path| path.is_file());
    found.ok_or_else(|| {
        Failure::usage("no herd file is named")
            .because(format!("there is no {NAME} here, and no {}", in_dir.display()))
            .hint("name one with --herd FILE")
    })
}

pub(super) fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|error| Failure::io("read", path, &error))
}
