//! From one server into another by PostgreSQL's own `pg_dump` and `pg_restore`, in one transaction: all of it is there afterwards, or nothing.
//!
//! Between the two nothing touches a disk. The last piece of a dump is passed on when `pg_dump` has ended well, so that no
//! half of one is committed. The server that gets it is named by a connection string, and asked by `psql`: so a string means here what it means to them.
//!
//! Leaves out: what is brought, and under which name. Hazard: writes into a server that works.

use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::error::{Error, Result, within};
use crate::installation::Installation;
use crate::sql::literal;

const PIECE_BYTES: usize = 256 * 1024;
/// Of what a program complains about.
const MAX_SAID_BYTES: u64 = 64 * 1024;
/// Lines of it that are told.
const MAX_TOLD: usize = 12;
const ASKING: Duration = Duration::from_secs(60);
/// Between fields and rows of an answer; no name has them.
const FIELD: &str = "\u{1f}";
const ROW: &str = "\u{1e}";

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LiveError {
    #[error("{} is not there", .program.display())]
    NoProgram { program: PathBuf },

    /// In psql's words.
    #[error("{said}")]
    Refused { said: String },

    #[error("pg_dump failed: {said}")]
    Dump { said: String },

    #[error("nothing was brought in: {said}")]
    Load { said: String },

    #[error(transparent)]
    Other(#[from] Error),
}

impl LiveError {
    pub fn hint(&self) -> Option<String> {
        match self {
            LiveError::NoProgram { .. } => {
                Some("it comes with PostgreSQL's client programs; on Debian: apt-get install postgresql-client-VERSION".to_owned())
            }
            LiveError::Load { said } if said.contains("does not exist") => Some(
                "what a table refers to (types, functions, tables, roles) has to be there; nothing of it was left behind".to_owned(),
            ),
            LiveError::Load { said } if said.contains("must be") || said.contains("permission denied") => {
                Some("connect as a superuser, or leave owners and grants out with --no-owner".to_owned())
            }
            LiveError::Load { .. } => Some("it was one transaction, and is undone".to_owned()),
            LiveError::Other(error) => error.hint().map(str::to_owned),
            _ => None,
        }
    }
}

/// A server that works, as libpq is told of it.
#[derive(Clone)]
pub struct Live {
    pub installation: Installation,
    /// May have a password.
    pub conninfo: String,
}

impl Live {
    /// The rows that a statement returns. `NULL` is an empty text.
    pub async fn ask(&self, statement: &str) -> Result<Vec<Vec<String>>, LiveError> {
        let program = program(&self.installation, "psql")?;
        let mut command = Command::new(&program);
        command
            .args(["-X", "-A", "-t", "-q", "-w", "-v", "ON_ERROR_STOP=1"])
            .args(["-F", FIELD, "-R", ROW, "-d", &self.conninfo])
            .args(["-c", "SET search_path = ''", "-c", statement])
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let output = within("asking the server that gets the tables", ASKING, async {
            command.output().await.map_err(Error::io("run", &program))
        })
        .await?;
        if !output.status.success() {
            return Err(LiveError::Refused { said: told(&output.stderr) });
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let text = text.strip_suffix('\n').unwrap_or(&text);
        if text.is_empty() {
            return Ok(Vec::new());
        }
        Ok(text.split(ROW).map(|row| row.split(FIELD).map(str::to_owned).collect()).collect())
    }

    /// Whether a session of a [`transfer`] of this program is still there.
    pub async fn is_loading(&self) -> Result<bool, LiveError> {
        let question = "SELECT 1 FROM pg_catalog.pg_stat_activity WHERE application_name =";
        Ok(!self.ask(&format!("{question} {}", literal(&application_name()))).await?.is_empty())
    }
}

/// By which its sessions are found again.
fn application_name() -> String {
    format!("pgherd restore {}", std::process::id())
}

/// What is brought.
#[derive(Clone, Debug)]
pub struct Dump {
    pub conninfo: String,
    /// Schema and name.
    pub tables: Vec<(String, String)>,
    /// As who owned them, with their grants. Else they belong to who brings them in.
    pub owners: bool,
    pub grants: bool,
    pub tablespaces: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transferred {
    /// That went from one to the other.
    pub bytes: u64,
}

/// Brings it. `seen` is told how many bytes went by. Dropping the future ends it, and nothing is there.
pub async fn transfer(
    dump: &Dump,
    from: &Installation,
    live: &Live,
    mut seen: impl FnMut(u64),
) -> Result<Transferred, LiveError> {
    let mut dumping = dumping(dump, from)?;
    let mut loading = loading(dump, live)?;
    let lost = || Error::Answer { what: "a pipe was not made".to_owned() };
    let mut out = dumping.stdout.take().ok_or_else(lost)?;
    let mut into = loading.stdin.take().ok_or_else(lost)?;
    let dump_said = tokio::spawn(said(dumping.stderr.take().ok_or_else(lost)?));
    let load_said = tokio::spawn(said(loading.stderr.take().ok_or_else(lost)?));
    let (mut held, mut piece) = (Vec::new(), vec![0; PIECE_BYTES]);
    let mut bytes = 0;
    let mut refused = false;
    loop {
        let read = out.read(&mut piece).await.map_err(Error::io("read from", "pg_dump"))?;
        if read == 0 {
            break;
        }
        // It says why it takes no more.
        if into.write_all(&held).await.is_err() {
            refused = true;
            break;
        }
        held = piece[..read].to_vec();
        bytes += read as u64;
        seen(bytes);
    }
    let ended = |status: std::io::Result<ExitStatus>| status.map_err(Error::io("wait for", "pg_dump"));
    if !refused {
        if !ended(dumping.wait().await)?.success() {
            // Before its input ends, so that it does not take this for the end of a dump.
            loading.start_kill().map_err(Error::io("end", "pg_restore"))?;
            loading.wait().await.map_err(Error::io("wait for", "pg_restore"))?;
            return Err(LiveError::Dump { said: told(&dump_said.await.unwrap_or_default()) });
        }
        refused = into.write_all(&held).await.is_err();
    }
    drop(into);
    let loaded = loading.wait().await.map_err(Error::io("wait for", "pg_restore"))?;
    if refused || !loaded.success() {
        return Err(LiveError::Load { said: told(&load_said.await.unwrap_or_default()) });
    }
    Ok(Transferred { bytes })
}

fn dumping(dump: &Dump, from: &Installation) -> Result<Child, LiveError> {
    let path = program(from, "pg_dump")?;
    let mut command = Command::new(&path);
    command.args(["--format=custom", "--compress=0", "--no-password", "--strict-names"]);
    // Publications would be joined, and unlogged tables have nothing in a backup.
    command.args(["--no-publications", "--no-subscriptions", "--no-security-labels"]);
    for (schema, name) in &dump.tables {
        command.arg(format!("--table={}.{}", quoted(schema), quoted(name)));
    }
    command
        .args(["-d", &dump.conninfo])
        .env_clear()
        .env("LANG", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    Ok(command.spawn().map_err(Error::io("run", &path))?)
}

fn loading(dump: &Dump, live: &Live) -> Result<Child, LiveError> {
    let path = program(&live.installation, "pg_restore")?;
    let mut command = Command::new(&path);
    command.args(["--single-transaction", "--exit-on-error", "--no-password"]);
    for (wanted, option) in [
        (dump.owners, "--no-owner"),
        (dump.grants, "--no-privileges"),
        (dump.tablespaces, "--no-tablespaces"),
    ] {
        if !wanted {
            command.arg(option);
        }
    }
    command
        .args(["-d", &live.conninfo])
        .env("PGAPPNAME", application_name())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    Ok(command.spawn().map_err(Error::io("run", &path))?)
}

fn program(installation: &Installation, name: &str) -> Result<PathBuf, LiveError> {
    let program = installation.program(name);
    match program.is_file() {
        true => Ok(program),
        false => Err(LiveError::NoProgram { program }),
    }
}

/// A name that `--table` takes as it is, and for no pattern.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

async fn said(stderr: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut stderr = stderr.take(MAX_SAID_BYTES);
    // What cannot be read is not told.
    let _read = stderr.read_to_end(&mut bytes).await;
    // A program whose pipe is full waits for ever.
    let _rest = tokio::io::copy(&mut stderr.into_inner(), &mut tokio::io::sink()).await;
    bytes
}

fn told(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let lines: Vec<&str> =
        text.lines().map(str::trim_end).filter(|line| !line.is_empty()).take(MAX_TOLD).collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_no_pattern() {
        assert_eq!(quoted("Orders*"), "\"Orders*\"");
        assert_eq!(quoted("a\"b"), "\"a\"\"b\"");
    }
}
