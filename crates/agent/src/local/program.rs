//! The program that the agents run: a copy of this one, named after its content.
//!
//! A new build, or a directory that the agents' user cannot enter, must not matter to agents that run; and
//! all agents of a herd run the same program, whichever is restarted when.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest;

use super::LocalError;
use super::home::Home;
use super::process;

/// Bytes of the hash in the name: enough to tell builds apart, short enough to read.
const HASH_BYTES: usize = 6;

/// Copies `program` into the herd's directory, unless this very one is there.
pub(super) fn place(home: &Home, program: &Path) -> Result<PathBuf, LocalError> {
    let placed = home.bin_dir().join(format!("pgherd-{}", hash(program)?));
    if !placed.is_file() {
        let beside = placed.with_extension("new");
        fs::copy(program, &beside).map_err(LocalError::io("write", &beside))?;
        fs::set_permissions(&beside, fs::Permissions::from_mode(0o755))
            .map_err(LocalError::io("set the mode of", &beside))?;
        fs::rename(&beside, &placed).map_err(LocalError::io("put in place", &placed))?;
    }
    Ok(placed)
}

/// Removes copies that are neither `kept` nor run by anybody.
pub(super) fn remove_unused(home: &Home, kept: &Path) {
    let used = process::programs_in_use(&home.bin_dir());
    let entries = fs::read_dir(home.bin_dir()).into_iter().flatten().flatten().map(|entry| entry.path());
    for old in entries.filter(|path| path != kept && !used.contains(path)) {
        if let Err(error) = fs::remove_file(&old) {
            tracing::warn!(%error, path = %old.display(), "cannot remove a program that nobody runs");
        }
    }
}

fn hash(program: &Path) -> Result<String, LocalError> {
    let mut file = File::open(program).map_err(LocalError::io("read", program))?;
    let mut context = digest::Context::new(&digest::SHA256);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(LocalError::io("read", program))? {
            0 => break,
            read => context.update(&buffer[..read]),
        }
    }
    let hash = context.finish();
    Ok(hash.as_ref()[..HASH_BYTES].iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_placed_once_and_an_old_one_goes_when_nobody_runs_it() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::at(dir.path());
        fs::create_dir(home.bin_dir()).unwrap();
        let old = place(&home, Path::new("/bin/sleep")).unwrap();
        assert_eq!(place(&home, Path::new("/bin/sleep")).unwrap(), old);
        let new = place(&home, Path::new("/bin/true")).unwrap();
        assert_ne!(new, old);

        let mut runs = std::process::Command::new(&old).arg("60").spawn().unwrap();
        remove_unused(&home, &new);
        assert!(old.exists() && new.exists());
        runs.kill().unwrap();
        runs.wait().unwrap();
        remove_unused(&home, &new);
        assert!(!old.exists() && new.exists());
    }
}
