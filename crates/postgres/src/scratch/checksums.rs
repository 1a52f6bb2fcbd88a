//! All pages of a server that was stopped, held against their checksums by PostgreSQL's own `pg_checksums`.
//!
//! Leaves out: repairing. Hazard: a cluster without checksums has nothing to be checked, and is not whole for that; so that is an answer
//! of its own.

use std::path::Path;
use std::process::Stdio;

use super::FILES;
use crate::control::ControlFile;
use crate::error::{Error, Result, blocking};
use crate::installation::Installation;

/// Lines of what is wrong that are told; more of them say the same.
const MAX_TOLD: usize = 20;

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checksums {
    /// The cluster has none.
    Off,
    Good {
        files: u64,
        blocks: u64,
    },
    /// So many blocks, and the first of them in words.
    Bad {
        blocks: u64,
        told: Vec<String>,
    },
}

/// Reads every page. Dropping the future ends it.
pub async fn checksums(installation: &Installation, data_dir: &Path) -> Result<Checksums> {
    let control = {
        let data_dir = data_dir.to_owned();
        blocking("reading pg_control", FILES, move || ControlFile::of(&data_dir)).await?
    };
    if !control.data_checksums {
        return Ok(Checksums::Off);
    }
    let program = installation.program("pg_checksums");
    let output = tokio::process::Command::new(&program)
        .arg("--check")
        .arg("-D")
        .arg(data_dir)
        .env_clear()
        .env("LANG", "C.UTF-8")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(Error::io("run", &program))?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    read(&out, &err).ok_or_else(|| Error::Program {
        program: "pg_checksums",
        status: output.status.to_string(),
        output: err.trim().to_owned(),
    })
}

/// None where it did not come to its end.
fn read(out: &str, err: &str) -> Option<Checksums> {
    let number =
        |name: &str| out.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    match number("Bad checksums:")? {
        0 => Some(Checksums::Good { files: number("Files scanned:")?, blocks: number("Blocks scanned:")? }),
        blocks => Some(Checksums::Bad {
            blocks,
            told: err.lines().take(MAX_TOLD).map(|line| line.trim().to_owned()).collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pg_checksums_says() {
        let good = "Checksum operation completed\nFiles scanned:   974\nBlocks scanned:  2957\nBad checksums:  0\n\
                    Data checksum version: 1\n";
        assert_eq!(read(good, ""), Some(Checksums::Good { files: 974, blocks: 2957 }));
        let bad = good.replace("checksums:  0", "checksums:  1");
        let err = "pg_checksums: error: checksum verification failed in file \"x\", block 0: calculated 1 but block contains 2\n";
        assert!(matches!(read(&bad, err), Some(Checksums::Bad { blocks: 1, told }) if told.len() == 1));
        assert_eq!(read("", "pg_checksums: error: cluster must be shut down"), None);
    }
}
