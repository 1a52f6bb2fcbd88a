//! Where PostgreSQL's programs are and which version they are.
//!
//! Leaves out: installing anything. Hazard: programs of another major version than the data directory's refuse
//! it at best; so the version is asked from the binary, not read from a path.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use crate::error::{Error, Result, within};

/// The major versions that the driver was written and tested for.
pub const SUPPORTED: std::ops::RangeInclusive<u16> = 14..=18;

/// Where Debian and its relatives, then Red Hat's, put a major version's programs.
const PLACES: [(&str, &str); 2] = [("/usr/lib/postgresql/", "/bin"), ("/usr/pgsql-", "/bin")];

/// What the driver runs. A package without one of them is not a server's.
const PROGRAMS: [&str; 5] = ["postgres", "initdb", "pg_basebackup", "pg_rewind", "pg_waldump"];

const ASKING_THE_VERSION: Duration = Duration::from_secs(10);

/// `15.18`: major and minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    pub major: u16,
    pub minor: u16,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// PostgreSQL's programs of one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation {
    pub bin_dir: PathBuf,
    pub version: Version,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InstallationError {
    #[error("PostgreSQL {major} is not installed (looked in {})", list(.looked))]
    NotInstalled { major: u16, looked: Vec<PathBuf> },

    #[error("no PostgreSQL is installed (looked in {})", list(.looked))]
    NoneInstalled { looked: Vec<PathBuf> },

    #[error("{} has no {program}", .bin_dir.display())]
    ProgramMissing { bin_dir: PathBuf, program: &'static str },

    #[error("{} is PostgreSQL {version}; supported are {} to {}", .bin_dir.display(), SUPPORTED.start(), SUPPORTED.end())]
    Unsupported { bin_dir: PathBuf, version: Version },

    #[error(transparent)]
    Other(#[from] Error),
}

impl InstallationError {
    pub fn hint(&self) -> Option<String> {
        match self {
            InstallationError::NotInstalled { major, .. } => Some(format!(
                "on Debian: set create_main_cluster = false in /etc/postgresql-common/createcluster.conf, then \
                 apt-get install postgresql-{major}"
            )),
            InstallationError::NoneInstalled { .. } => Some(
                "install PostgreSQL's server package, or set bin_dir to the directory of its programs".into(),
            ),
            InstallationError::ProgramMissing { program, .. } => {
                Some(format!("{program} comes with PostgreSQL's server package"))
            }
            InstallationError::Unsupported { .. } => None,
            InstallationError::Other(error) => error.hint().map(str::to_owned),
        }
    }
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl Installation {
    /// The programs in `bin_dir`.
    pub async fn at(bin_dir: &Path) -> Result<Installation, InstallationError> {
        for program in PROGRAMS {
            if !bin_dir.join(program).is_file() {
                return Err(InstallationError::ProgramMissing { bin_dir: bin_dir.to_owned(), program });
            }
        }
        let version = ask_version(&bin_dir.join("postgres")).await?;
        if !SUPPORTED.contains(&version.major) {
            return Err(InstallationError::Unsupported { bin_dir: bin_dir.to_owned(), version });
        }
        Ok(Installation { bin_dir: bin_dir.to_owned(), version })
    }

    /// The distribution's packages of one major version.
    pub async fn of_version(major: u16) -> Result<Installation, InstallationError> {
        let places = PLACES.map(|(before, after)| PathBuf::from(format!("{before}{major}{after}")));
        match places.iter().find(|place| place.join("postgres").is_file()) {
            Some(place) => Installation::at(place).await,
            None => Err(InstallationError::NotInstalled { major, looked: places.to_vec() }),
        }
    }

    /// The newest supported version that is installed.
    pub async fn newest() -> Result<Installation, InstallationError> {
        let mut looked = Vec::new();
        for major in SUPPORTED.rev() {
            match Installation::of_version(major).await {
                Err(InstallationError::NotInstalled { looked: places, .. }) => looked.extend(places),
                found => return found,
            }
        }
        Err(InstallationError::NoneInstalled { looked })
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.bin_dir.join(name)
    }
}

async fn ask_version(postgres: &Path) -> Result<Version, InstallationError> {
    let asked = tokio::process::Command::new(postgres)
        .arg("--version")
        .env_clear()
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = within("asking PostgreSQL for its version", ASKING_THE_VERSION, async {
        asked.await.map_err(Error::io("run", postgres))
    })
    .await?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_version(&text).ok_or_else(|| {
        Error::Program {
            program: "postgres --version",
            status: output.status.to_string(),
            output: format!("{}{}", text.trim(), String::from_utf8_lossy(&output.stderr).trim()),
        }
        .into()
    })
}

/// From `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)` or `postgres (PostgreSQL) 18beta2`.
fn parse_version(text: &str) -> Option<Version> {
    let number = text.split_whitespace().nth(2)?;
    let (major, rest) = match number.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => number.split_at(at),
        None => (number, ""),
    };
    let minor: String =
        rest.strip_prefix('.').unwrap_or("").chars().take_while(char::is_ascii_digit).collect();
    Some(Version { major: major.parse().ok()?, minor: minor.parse().unwrap_or(0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_the_programs_print_them() {
        let version = |major, minor| Some(Version { major, minor });
        assert_eq!(parse_version("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"), version(15, 18));
        assert_eq!(parse_version("postgres (PostgreSQL) 18beta2\n"), version(18, 0));
        assert_eq!(parse_version("postgres (PostgreSQL) 17\n"), version(17, 0));
        assert_eq!(parse_version("command not found"), None);
    }
}
