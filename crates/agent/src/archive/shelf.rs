//! What a server keeps in its `pg_wal`, for an archive that has holes: its own agent reads it ([`Shelf`]), and gives it to the owner of the archive
//! ([`answer`]).
//!
//! Given is a whole segment, the end of a timeline, or a history. A name of a file is made from numbers here and comes from nobody, and a
//! file counts by its content: PostgreSQL has segments under names that are still to come, and one that is being written.
//!
//! Leaves out: what is asked for (`core`, `pgherd_backup::wal::missing`), and whether it belongs to the herd's history, which who asks
//! has to see for himself. Hazard: files of this server that are no WAL; so nothing else can be named.

use std::path::PathBuf;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use pgherd_api::objects::join;
use pgherd_api::wal::{WalAsk, WalTold, WalWanted};
use pgherd_api::{Code, Error};
use pgherd_backup::wal::offered::{self, Expected, Unfit};
use pgherd_backup::wal::{History, HistoryError, Segment, Segments, Wanted};
use pgherd_core::types::{Lsn, NodeName, SystemId, Timeline};
use pgherd_postgres::base_backup;

use super::holes::{Member, NotGiven, Want};
use crate::causes::on_one_line;

/// Of a file that was left behind by a promotion, if its server archives by a command.
const PARTIAL: &str = ".partial";

/// Why it has nothing to give.
#[derive(Debug, thiserror::Error)]
enum NotHere {
    #[error("its data directory cannot be read: {0}")]
    Unreadable(#[from] pgherd_postgres::Error),
    #[error("its server is of cluster {found}")]
    OtherSystem { found: SystemId },
    #[error("its server's segments have {found} bytes")]
    OtherSegments { found: u32 },
    #[error("it has no {file}")]
    Absent { file: String },
    #[error("what it has under that name is something else: {0}")]
    Unfit(#[from] Unfit),
    #[error(transparent)]
    History(#[from] HistoryError),
}

/// The WAL of one data directory.
#[derive(Clone, Debug)]
pub struct Shelf {
    name: String,
    data_dir: PathBuf,
}

impl Shelf {
    /// `name`: the node's, for messages.
    pub fn new(name: &str, data_dir: PathBuf) -> Shelf {
        Shelf { name: name.to_owned(), data_dir }
    }

    /// Blocks.
    fn take(&self, want: &Want) -> Result<Bytes, NotHere> {
        let (_, control) = base_backup::control(&self.data_dir)?;
        if control.system_id != want.system {
            return Err(NotHere::OtherSystem { found: control.system_id });
        }
        if control.wal_segment_bytes != want.segments.bytes() {
            return Err(NotHere::OtherSegments { found: control.wal_segment_bytes });
        }
        let absent = || NotHere::Absent { file: want.file() };
        let expected = |history| Expected {
            system: want.system,
            segments: want.segments,
            history,
            before: None,
            behind: None,
        };
        match want.wanted {
            Wanted::History(timeline) => {
                let content = base_backup::own_history(&self.data_dir, timeline).ok_or_else(absent)?;
                History::parse(timeline, &content)?;
                Ok(content.into())
            }
            Wanted::Segment(segment) => {
                let content = self.file(want.segments, segment, "").ok_or_else(absent)?;
                let history = self.history(segment.timeline);
                // The last record may not be whole here yet. Where the next file is not there, who asks has to know.
                let next = Segment { number: segment.number + 1, ..segment };
                let behind = self.file(want.segments, next, "");
                let expected = Expected { behind: behind.as_deref(), ..expected(history.as_ref()) };
                offered::whole(expected, segment, &content)?;
                Ok(content.into())
            }
            Wanted::End { segment, until } => {
                let bytes = (until.0 - want.segments.start(segment).0) as usize;
                let end = |suffix| {
                    let mut content = self.file(want.segments, segment, suffix).ok_or_else(absent)?;
                    content.truncate(bytes);
                    offered::end(expected(None), segment, until, &content)?;
                    Ok(content.into())
                };
                end("").or_else(|error| end(PARTIAL).map_err(|_| error))
            }
        }
    }

    fn file(&self, segments: Segments, segment: Segment, suffix: &str) -> Option<Vec<u8>> {
        let file = format!("{}{suffix}", segments.file_name(segment));
        base_backup::own_wal(&self.data_dir, &file, segments.bytes())
    }

    /// As this server has it.
    fn history(&self, timeline: Timeline) -> Option<History> {
        match timeline {
            Timeline(1) => Some(History::first()),
            timeline => History::parse(timeline, &base_backup::own_history(&self.data_dir, timeline)?).ok(),
        }
    }
}

impl Member for Shelf {
    fn name(&self) -> &str {
        &self.name
    }

    fn ask<'a>(&'a self, want: &'a Want) -> BoxFuture<'a, Result<Bytes, NotGiven>> {
        let (this, want) = (self.clone(), *want);
        async move {
            match tokio::task::spawn_blocking(move || this.take(&want)).await {
                Ok(Ok(bytes)) => Ok(bytes),
                Ok(Err(not_here)) => Err(NotGiven::Absent(on_one_line(&not_here))),
                Err(lost) => Err(NotGiven::Silent(on_one_line(&lost))),
            }
        }
        .boxed()
    }
}

/// For another agent of the herd. Without a data directory there is nothing.
pub(crate) async fn answer(data_dir: Option<PathBuf>, from: &NodeName, ask: WalAsk) -> Result<Bytes, Error> {
    let want = understood(&ask)?;
    let Some(data_dir) = data_dir else {
        return Ok(join(&WalTold::Absent { why: "it has no PostgreSQL".to_owned() }, &[]));
    };
    match Shelf::new("", data_dir).ask(&want).await {
        Ok(bytes) => {
            tracing::info!(file = want.file(), to = %from, "gave WAL that the repository lacks");
            Ok(join(&WalTold::Bytes, &bytes))
        }
        Err(NotGiven::Absent(why)) => Ok(join(&WalTold::Absent { why }, &[])),
        Err(NotGiven::Silent(why)) => Err(Error::of(Code::Internal).because(why)),
    }
}

/// What is asked for, if there can be such a thing.
fn understood(ask: &WalAsk) -> Result<Want, Error> {
    let malformed = |why: &dyn std::fmt::Display| Error::of(Code::RequestMalformed).because(why);
    let system = ask.system_identifier.parse().map_err(|_| malformed(&"no system identifier"))?;
    let segments = Segments::new(ask.segment_bytes).map_err(|error| malformed(&error))?;
    let timeline = Timeline(ask.timeline);
    let segment = |number| {
        let segment = Segment { timeline, number };
        match segments.parse(&segments.file_name(segment)) == Some(segment) {
            true => Ok(segment),
            false => Err(malformed(&"there is no such segment")),
        }
    };
    let wanted = match ask.wanted {
        WalWanted::History if timeline > Timeline(1) => Wanted::History(timeline),
        WalWanted::History => return Err(malformed(&"that timeline has no history")),
        WalWanted::Segment { number } => Wanted::Segment(segment(number)?),
        WalWanted::End { number, bytes } if (1..segments.bytes()).contains(&bytes) => {
            let segment = segment(number)?;
            let until = Lsn(segments.start(segment).0 + u64::from(bytes));
            Wanted::End { segment, until }
        }
        WalWanted::End { .. } => return Err(malformed(&"no timeline ends there")),
    };
    Ok(Want { system, segments, wanted })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(timeline: u32, wanted: WalWanted) -> WalAsk {
        WalAsk { system_identifier: "42".to_owned(), timeline, segment_bytes: 16 << 20, wanted }
    }

    #[test]
    fn what_cannot_be_a_file_of_wal_is_not_looked_for() {
        let segment = |number| WalWanted::Segment { number };
        let end = |bytes| WalWanted::End { number: 7, bytes };
        assert_eq!(understood(&ask(3, segment(0x1_02))).unwrap().file(), "000000030000000100000002");
        assert_eq!(understood(&ask(3, WalWanted::History)).unwrap().file(), "00000003.history");
        let wanted = understood(&ask(3, end(9))).unwrap().wanted;
        let until = Lsn(7 * (16 << 20) + 9);
        assert_eq!(wanted, Wanted::End { segment: Segment { timeline: Timeline(3), number: 7 }, until });
        let wrong = [
            ask(0, segment(1)),
            ask(1, WalWanted::History),
            ask(0, WalWanted::History),
            ask(3, segment(u64::MAX)),
            ask(3, segment(1 << 40)),
            ask(3, end(0)),
            ask(3, end(16 << 20)),
            WalAsk { segment_bytes: 3, ..ask(3, segment(1)) },
            WalAsk { system_identifier: "../../etc/passwd".to_owned(), ..ask(3, segment(1)) },
        ];
        for wrong in wrong {
            assert!(understood(&wrong).unwrap_err().is(Code::RequestMalformed), "{wrong:?}");
        }
    }

    #[tokio::test]
    async fn a_witness_has_nothing_and_says_so() {
        let told = answer(None, &"b".parse().unwrap(), ask(3, WalWanted::History)).await.unwrap();
        let (told, bytes) = pgherd_api::objects::split::<WalTold>(&told).unwrap();
        assert!(matches!(told, WalTold::Absent { .. }) && bytes.is_empty());
        let nowhere =
            answer(Some("/nowhere".into()), &"b".parse().unwrap(), ask(3, WalWanted::History)).await;
        let (told, _) = pgherd_api::objects::split::<WalTold>(&nowhere.unwrap()).unwrap();
        assert!(matches!(&told, WalTold::Absent { why } if why.contains("/nowhere")), "{told:?}");
    }
}
