//! Streams WAL of one server into a repository, as the agent of a herd does that owns the stream: for measuring.
//!
//! `receive_wal SOCKET SLOT REPOSITORY SYSTEM [UNTIL [PIECES_MS]]`, such as `/tmp/.s.PGSQL.5432 keeper repository.toml 7575 0/5000000`. It says
//! `durable LSN` for each position up to where WAL is in the archive, and ends when UNTIL is; `-` is never. With PIECES_MS a segment that is not
//! complete is put as pieces, too.
//! Hazard: it is nobody's owner. Two of them do no harm, since objects are put once.

use std::io::Write;
use std::time::Duration;

use pgherd_agent::archive::{Archiving, Gap, Order};
use pgherd_backup::receive::Branch;
use pgherd_core::types::Lsn;
use pgherd_postgres::replication::{SlotName, Source};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, slot, repository, system, more @ ..] = &arguments[..] else {
        return Err("SOCKET SLOT REPOSITORY SYSTEM [UNTIL [PIECES_MS]]".into());
    };
    let until: Option<Lsn> = match more.first().map(String::as_str) {
        None | Some("-") => None,
        Some(text) => Some(text.parse()?),
    };
    let piece_every = more.get(1).map(|text| text.parse().map(Duration::from_millis)).transpose()?;
    let order = Order {
        source: Source::Local { socket: socket.into(), role: "postgres".to_owned() },
        slot: Some(SlotName::new(slot).ok_or("no name of a slot")?),
        repository: pgherd_agent::repository::open(repository.as_ref()).await?,
        system: system.parse()?,
        branch: Branch::Refuse,
        gap: Gap::Refuse,
        piece_every,
        until: None,
    };
    let archiving = Archiving::begin(order);
    let mut status = archiving.status();
    let mut shown = None;
    loop {
        let (durable, error) = {
            let status = status.borrow_and_update();
            (status.durable, status.last_error.as_ref().map(ToString::to_string))
        };
        if let Some(error) = error {
            return Err(error.into());
        }
        if let Some(durable) = durable.filter(|durable| Some(*durable) > shown) {
            // Who measures takes the time of each line.
            writeln!(std::io::stdout(), "durable {durable}")?;
            shown = Some(durable);
        }
        if until.is_some() && shown >= until {
            archiving.end().await;
            return Ok(());
        }
        status.changed().await?;
    }
}
