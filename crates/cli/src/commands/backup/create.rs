//! `pgherd backup create`: a base backup of a server on this host, or of one that sends its files.

use std::num::{NonZeroU32, NonZeroU64};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use pgherd_agent::backups::Progress;
use pgherd_agent::backups::create::{self, CreateError, Floor, Order, Server};
use pgherd_agent::backups::take::Find;
use pgherd_agent::foreign_server::ForeignServer;
use pgherd_agent::named_server::NamedServer;
use pgherd_api::backup::{BackupMode, Created};
use tokio::sync::watch;

use crate::args::Global;
use crate::commands::password_from_environment;
use crate::failure::Failure;
use crate::output::numbers::{bytes, counted, span};
use crate::output::{note, print_json, print_line, progress};

/// A host's name that cannot be made into a node's.
const NO_NAME: &str = "server";

/// Take a base backup now
///
/// Of the herd, by the agent that it chooses; or with --repository and --data-dir of any server that runs on this host,
/// a primary or a standby, while everything goes on; or with --from-server of one on another host, which sends all of its files over its
/// replication protocol, from one process to one. It is built upon the newest backup: what has not changed is not stored again, and each
/// one is complete by itself and can be deleted alone. It is a backup only when all WAL of it is in the repository, which has to come
/// there by archive_command = 'pgherd wal push --repository FILE %p', or by a stream.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("server").args(["data_dir", "from_server"]))]
pub(super) struct CreateArgs {
    /// File that says where the repository is and what opens it
    #[arg(long, value_name = "FILE", requires = "server")]
    repository: Option<PathBuf>,
    /// Data directory of the server
    #[arg(long, value_name = "DIR", requires = "repository")]
    data_dir: Option<PathBuf>,
    /// A server that sends its files, such as 'host=db1 user=backup sslrootcert=FILE': also port, and sslmode=disable for no TLS. The role
    /// needs REPLICATION; $PGPASSWORD is used if the server asks for a password
    #[arg(long, value_name = "CONNECTION", requires = "repository", conflicts_with_all = ["user", "jobs"])]
    from_server: Option<String>,
    /// Where lists of its files are held meanwhile
    #[arg(long, value_name = "DIR", default_value = "/var/tmp", requires = "from_server")]
    scratch_dir: PathBuf,
    /// Directory of its socket, or an address of this host [default: what its postmaster.pid says]
    #[arg(long, value_name = "HOST", requires = "data_dir")]
    host: Option<String>,
    /// Port that it listens on [default: what its postmaster.pid says]
    #[arg(long, value_name = "PORT", requires = "data_dir")]
    port: Option<u16>,
    /// A superuser; $PGPASSWORD is used if the server asks for a password
    #[arg(long, value_name = "ROLE", default_value = "postgres")]
    user: String,
    /// What the backup remembers as its origin: a lower-case letter, then letters, digits and _ [default: this host's name]
    #[arg(long, value_name = "NAME", requires = "server")]
    name: Option<String>,
    /// Store everything, whatever earlier backups have
    #[arg(long, requires = "server")]
    full: bool,
    /// How it is found what has changed since the last backup [default: by WAL, and by both each 7th time]
    #[arg(long, value_name = "HOW", value_enum, requires = "data_dir", conflicts_with = "full")]
    changes: Option<ChangesArg>,
    /// Begin at once with a checkpoint as fast as the disk can, instead of one that is spread over minutes
    #[arg(long, requires = "server")]
    fast: bool,
    /// Files that are read beside each other
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=16))]
    jobs: u8,
    /// Limit of all of them together, in MiB a second
    #[arg(long, value_name = "MIB", requires = "server")]
    max_rate: Option<NonZeroU64>,
    /// Read as fast as it can be, whatever the server's clients feel of it
    #[arg(long, requires = "data_dir", conflicts_with = "min_rate")]
    no_throttle: bool,
    /// In MiB a second, below which the backup is not held back for the server's clients [default: what takes a day, and 8 at least]
    #[arg(long, value_name = "MIB", requires = "data_dir")]
    min_rate: Option<NonZeroU32>,
    /// How long WAL of the backup may take to come into the repository after the copy
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = humantime::parse_duration)]
    wal_timeout: Duration,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum ChangesArg {
    /// WAL says which pages were changed, and no others are read
    Wal,
    /// Everything is read, and compared with what the last backup has
    Compare,
    /// Everything is read and compared, and then held against WAL
    Both,
}

pub(super) async fn run(args: CreateArgs, global: &Global) -> Result<(), Failure> {
    let Some(repository) = args.repository else { return super::herd::create(global).await };
    let server = match (args.data_dir, args.from_server) {
        (Some(data_dir), _) => Server::Here(NamedServer {
            data_dir,
            host: args.host,
            port: args.port,
            role: args.user,
            password: password_from_environment(),
        }),
        (None, Some(text)) => {
            let parsed = ForeignServer::parse(&text, password_from_environment());
            let server = parsed.map_err(|error| {
                let hint = error.hint();
                Failure::usage(format!("--from-server: {error}")).hint(hint)
            })?;
            Server::Sends { server, scratch_dir: args.scratch_dir }
        }
        (None, None) => return super::herd::create(global).await,
    };
    let order = Order {
        repository,
        server,
        node: args.name.unwrap_or_else(host_name),
        full: args.full,
        find: match args.changes {
            None => Find::Automatic,
            Some(ChangesArg::Wal) => Find::Wal,
            Some(ChangesArg::Compare) => Find::Comparison,
            Some(ChangesArg::Both) => Find::Both,
        },
        checkpoint_fast: args.fast,
        readers: args.jobs.into(),
        max_bytes_per_second: args.max_rate.map(|rate| rate.saturating_mul(super::MIB)),
        throttle: (!args.no_throttle).then(|| args.min_rate.map_or(Floor::Day, Floor::of_mib)),
        wal_deadline: args.wal_timeout,
    };
    let prepared = create::prepare(order).await.map_err(failed)?;
    for remark in &prepared.remarks {
        note(&format!("warning: {remark}"));
    }
    match prepared.parent() {
        Some(parent) => note(&format!("takes a backup that is built upon {parent}")),
        None => note("takes a backup of everything"),
    }
    let is_gone_on_from = prepared.can_be_gone_on_from();
    let sender = watch::Sender::new(Progress::default());
    let seen = sender.subscribe();
    let work = prepared.run(&sender);
    let created = progress::shown("reading", "waiting for the WAL of the backup", seen, work).await;
    let created = match created {
        Ok(done) => done.map_err(failed)?,
        Err(interrupted) => {
            note(match is_gone_on_from {
                true => {
                    "interrupted: there is no backup; the next one goes on from what it has stored, or a later collection removes it"
                }
                false => {
                    "interrupted: there is no backup; what it has stored is removed by a later collection"
                }
            });
            return Err(interrupted);
        }
    };
    for file in &created.damaged {
        let pages: Vec<String> = file.pages.iter().take(10).map(ToString::to_string).collect();
        note(&format!(
            "warning: {} of {} with a wrong checksum; the backup has them as they are: {}",
            counted(file.pages.len(), "page", "pages"),
            file.path,
            pages.join(", ")
        ));
    }
    for file in &created.unexplained {
        let pages: Vec<String> = file.pages.iter().take(10).map(ToString::to_string).collect();
        note(&format!(
            "warning: {} of {} changed since the last backup without a word in WAL; the backup has them as they are: {}",
            counted(file.pages.len(), "page", "pages"),
            file.path,
            pages.join(", ")
        ));
    }
    if let Some(why) = created.backup.changes.as_ref().and_then(|changes| changes.why.as_ref()) {
        note(&format!("everything was read and compared: {why}"));
    }
    if let Some(seconds) = created.backup.held_back_seconds {
        note(&format!(
            "it was held back for {} for the server's clients",
            span(seconds.saturating_mul(1000))
        ));
    }
    if global.json {
        return print_json(&created);
    }
    note(&told(&created));
    print_line(&created.backup.id)
}

fn told(created: &Created) -> String {
    let backup = &created.backup;
    let mode = match backup.mode {
        Some(BackupMode::Incremental) => format!("{} were the same, ", bytes(created.kept_bytes)),
        _ if backup.continues.is_some() => format!("{} had been stored already, ", bytes(created.kept_bytes)),
        _ => String::new(),
    };
    format!(
        "backup {} in {}: read {}, {mode}stored {} in {}",
        backup.id,
        created.repository,
        bytes(created.read_bytes),
        bytes(backup.stored_bytes.unwrap_or_default()),
        span((created.seconds * 1000.0) as u64)
    )
}

/// This host's name, as far as it is one of a node.
fn host_name() -> String {
    let system = rustix::system::uname();
    let host = system.nodename().to_string_lossy().to_ascii_lowercase();
    let host = host.split('.').next().unwrap_or_default();
    let letter = |letter: char| if letter.is_ascii_alphanumeric() { letter } else { '_' };
    let name: String =
        host.chars().map(letter).skip_while(|letter| !letter.is_ascii_lowercase()).take(48).collect();
    if name.is_empty() { NO_NAME.to_owned() } else { name }
}

fn failed(error: CreateError) -> Failure {
    match error {
        CreateError::Repository(error) => super::failed(error),
        CreateError::Catalog(error) => super::of_catalog(error),
        error => {
            let hint = error.hint();
            hint.into_iter().fold(crate::failure::with_sources(&error), Failure::hint)
        }
    }
}
