//! A base backup of a server that sends its files itself, over its replication protocol: no agent and no directory is needed there.
//!
//! ```text
//! BASE_BACKUP         the server makes its checkpoint, and says where the backup begins
//! intent              the repository keeps the parent and WAL from there on
//!   members of archives as they come ─► parent's entry of that path ─► pack ─► entry
//!   the server's manifest is compared with what has come
//!   entries in order of paths ─► maps
//! WAL up to the stop is in the archive
//! manifest
//! ```
//!
//! There is one connection and one reader: a server sends a backup from one process. Everything is sent, whatever the parent has of it; what
//! has not changed is not stored again. A page that looks damaged cannot be read again, so one that the server was
//! writing just then is told of, too; WAL has that one whole.
//!
//! Files come in the order of the other server's directories. What of the parent is asked for, what has come and what the maps wait for
//! therefore lies in files without a name, so that memory does not grow with the number of files.
//!
//! Leaves out: archiving WAL. Hazard: as [`mod@take`] has it, whose beginning and end these are; and a stream that was cut off
//! must not be taken for a small server, which the server's own end of it and its manifest say.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use jiff::Timestamp;
use pgherd_backup::format::Repository;
use pgherd_backup::map::Entry;
use pgherd_backup::map::sorting::{Former, Sorted, Sorter};
use pgherd_backup::pack::{DurablePacks, FULL_FRAME_PAGES, INCREMENTAL_FRAME_PAGES};
use pgherd_backup::wal::{Archive, Segments};
use pgherd_core::types::Lsn;
use pgherd_postgres::base_backup::listing::{Content as Pages, is_left_out};
use pgherd_postgres::base_backup::reading::Checksums;
use pgherd_postgres::base_backup::sent::{FileSum, Sent};
use pgherd_postgres::base_backup::streamed::{BackupStream, Event, Part, Shape, damaged_pages};
use pgherd_postgres::base_backup::tar::{Member, MemberKind};
use pgherd_postgres::base_backup::{BaseBackupError, Checkpoint};
use pgherd_postgres::control::ControlFile;
use pgherd_postgres::replication::{Identified, Replication};
use tokio::sync::watch;

use super::storing::{Content, Shared, Storing};
use super::take::{
    self, CHECKPOINT, Damaged, Ending, MAX_DAMAGED, Order, Origin, TakeError, Taken, beat, beats, while_alive,
};
use super::{Done, Progress, REPORT, Stop, Throttle, on_a_thread};

/// Between two looks whether somebody still waits.
const LOOK: Duration = Duration::from_millis(500);
/// A server that says nothing for so long is gone: it tells how far it is each time it has sent some pages.
const SILENCE: Duration = Duration::from_secs(600);
/// The control file has 8 KiB, and the others some lines.
const MAX_HELD_BYTES: u64 = 16 * 1024 * 1024;

/// The server that is backed up.
pub(super) struct Source {
    pub(super) replication: Replication,
    pub(super) identified: Identified,
    pub(super) shape: Shape,
    /// Where files without a name are made.
    pub(super) scratch_dir: PathBuf,
}

/// Takes a backup. Dropping the future ends it.
pub(super) async fn take(
    repository: &Repository,
    source: Source,
    order: &Order,
    progress: &watch::Sender<Progress>,
) -> Result<Taken, TakeError> {
    let Source { replication, identified, shape, scratch_dir } = source;
    let began = Timestamp::now();
    let segments = Segments::new(identified.segment_bytes)?;
    let archive = Archive::new(repository, identified.system, segments);
    let fast = order.checkpoint == Checkpoint::Fast;
    let stream = BackupStream::begin(replication, shape, "pgherd", fast, CHECKPOINT).await?;
    let (start, timeline) = (stream.start(), stream.timeline());
    if timeline != identified.timeline {
        return Err(BaseBackupError::OtherTimeline { from: identified.timeline, to: timeline }.into());
    }
    let origin = Origin { system: identified.system, timeline, wal_from: start };
    let mut backup = take::begin(repository, &origin, order, None).await?;
    let shared = Arc::new(Shared {
        repository: repository.clone(),
        data_dir: PathBuf::new(),
        checksums: stream.checksums(),
        throttle: Arc::new(Throttle::new(order.max_bytes_per_second)),
        stop: Stop::default(),
        done: Done::default(),
        oldest: backup.parent().and_then(|parent| parent.packs.keys().next().copied()),
        refresh_bytes: AtomicU64::new(order.refresh_bytes),
        refreshed_bytes: AtomicU64::new(0),
        kept_bytes: AtomicU64::new(0),
        read_bytes: AtomicU64::new(0),
        // All of it comes over the line in any case.
        known: None,
    });
    // Whatever way this ends, the reader ends with it.
    let _ended = shared.stop.when_dropped();
    shared.done.total_bytes.store(stream.bytes(), Ordering::Relaxed);
    let parent = backup.parent().map(|parent| parent.entries(&repository.on_own_thread()));
    let frame_pages = if parent.is_some() { INCREMENTAL_FRAME_PAGES } else { FULL_FRAME_PAGES };
    let storing = Storing::new(backup.packs(frame_pages), Arc::clone(&shared));
    let receiving = {
        let shared = Arc::clone(&shared);
        on_a_thread(move || async move {
            let former = match parent {
                Some(parent) => Some(Former::read(parent, &scratch_dir).await?),
                None => None,
            };
            let incoming = Incoming { stream, stop: shared.stop.clone() };
            receive(incoming, storing, former, &scratch_dir).await
        })
    };
    let mut receiving = std::pin::pin!(receiving);
    let (mut beats, mut reports) = (beats(), tokio::time::interval(REPORT));
    let received = loop {
        tokio::select! {
            done = &mut receiving => break done??,
            _ = beats.tick() => beat(&mut backup).await,
            _ = reports.tick() => drop(progress.send_replace(shared.progress())),
        }
    };
    progress.send_replace(shared.progress());
    let Received { packs, mut entries, control, backup_label, tablespace_map, stop, damaged } = received;
    if control.system_id != identified.system {
        let (found, wanted) = (control.system_id, identified.system);
        return Err(BaseBackupError::OtherCluster { found, wanted }.into());
    }
    let own = (control.page_bytes, control.file_pages, control.data_checksums);
    if own != (shape.page_bytes, shape.file_pages, shape.data_checksums) {
        return Err(TakeError::Incomplete { what: "its control file says other sizes than its settings" });
    }
    let mut maps = backup.maps();
    let writing = async {
        while let Some(entry) = entries.next()? {
            maps.push(&entry).await?;
        }
        Ok::<_, TakeError>(maps.finish().await?)
    };
    let maps = while_alive(&mut backup, writing).await?;
    let proving = take::prove(&archive, timeline, (start, stop), order.wal_deadline, None);
    let wal = while_alive(&mut backup, proving).await?;
    let ending = Ending {
        packs: vec![packs],
        maps,
        control,
        vanished: 0,
        damaged,
        unexplained: Vec::new(),
        version: shape.version,
        began,
        backup_label,
        tablespace_map,
    };
    take::conclude(backup, wal, ending, &shared).await
}

/// All that has come.
struct Received {
    packs: DurablePacks,
    entries: Sorted,
    control: ControlFile,
    backup_label: Vec<u8>,
    tablespace_map: Vec<u8>,
    stop: Lsn,
    damaged: Vec<Damaged>,
}

/// A stream, as long as somebody waits for it.
struct Incoming {
    stream: BackupStream,
    stop: Stop,
}

impl Incoming {
    async fn next(&mut self) -> Result<Event, TakeError> {
        let began = Instant::now();
        loop {
            if self.stop.is_wanted() {
                return Err(TakeError::Stopped);
            }
            match tokio::time::timeout(LOOK, self.stream.next()).await {
                Ok(event) => return Ok(event?),
                Err(_) if began.elapsed() < SILENCE => {}
                Err(_) => return Err(TakeError::Silent(SILENCE)),
            }
        }
    }
}

/// The content of a file that comes.
struct Arriving<'a> {
    incoming: &'a mut Incoming,
    left: u64,
    pending: Bytes,
    sum: FileSum,
    at: u64,
    judged: Option<(Checksums, u32)>,
    damaged: Vec<u32>,
}

impl<'a> Arriving<'a> {
    fn new(incoming: &'a mut Incoming, member: &Member) -> Arriving<'a> {
        let judged = match incoming.stream.content(&member.path) {
            Pages::Pages { first_block } => incoming.stream.checksums().map(|by| (by, first_block)),
            _ => None,
        };
        let (sum, damaged) = (FileSum::default(), Vec::new());
        Arriving { incoming, left: member.size, pending: Bytes::new(), sum, at: 0, judged, damaged }
    }

    /// All of a small one.
    async fn whole(&mut self) -> Result<Vec<u8>, TakeError> {
        if self.left > MAX_HELD_BYTES {
            return Err(TakeError::Incomplete { what: "a file of some lines is larger than that" });
        }
        let mut content = Vec::with_capacity(self.left as usize);
        if self.left > 0 {
            self.read(&mut content).await?;
        }
        Ok(content)
    }

    /// Nothing of it is kept.
    async fn pass_over(&mut self) -> Result<(), TakeError> {
        let mut piece = Vec::with_capacity(super::PIECE_BYTES);
        while self.left > 0 {
            self.read(&mut piece).await?;
        }
        Ok(())
    }
}

impl Content for Arriving<'_> {
    async fn read(&mut self, piece: &mut Vec<u8>) -> Result<(), TakeError> {
        piece.clear();
        while self.left > 0 && piece.len() < piece.capacity() {
            if self.pending.is_empty() {
                let Event::Content(bytes) = self.incoming.next().await? else {
                    return Err(TakeError::Incomplete { what: "a file ends before its size" });
                };
                self.pending = bytes;
            }
            let room = (piece.capacity() - piece.len()).min(self.pending.len());
            let more = self.pending.split_to(room);
            self.left = self.left.saturating_sub(more.len() as u64);
            piece.extend_from_slice(&more);
        }
        self.sum.update(piece);
        if let Some((by, first_block)) = self.judged {
            self.damaged.extend(damaged_pages(piece, self.at, by, first_block));
        }
        self.at += piece.len() as u64;
        Ok(())
    }

    fn damaged(&self) -> Vec<u32> {
        self.damaged.clone()
    }
}

async fn receive(
    mut incoming: Incoming,
    mut storing: Storing,
    former: Option<Former>,
    scratch_dir: &Path,
) -> Result<Received, TakeError> {
    let timeline = incoming.stream.timeline();
    let (mut sorter, mut sent) = (Sorter::new(scratch_dir)?, Sent::new(scratch_dir)?);
    let (mut control, mut damaged) = (None, Vec::new());
    let (mut backup_label, mut tablespace_map) = (Vec::new(), Vec::new());
    let stop = loop {
        let member = match incoming.next().await? {
            Event::Member(member) => member,
            Event::Manifest(bytes) => {
                sent.manifest(&bytes)?;
                continue;
            }
            Event::Content(_) => return Err(TakeError::Incomplete { what: "a file has more than its size" }),
            Event::End { stop, timeline: to } if to == timeline => break stop,
            Event::End { timeline: to, .. } => {
                return Err(BaseBackupError::OtherTimeline { from: timeline, to }.into());
            }
        };
        match &member.kind {
            MemberKind::Directory if is_left_out(&member.path) => continue,
            MemberKind::Directory => {
                sorter.push(&Entry::directory(member.path, member.mode))?;
                continue;
            }
            MemberKind::Symlink(to) => {
                sorter.push(&Entry::symlink(member.path, to.clone()))?;
                continue;
            }
            MemberKind::File => {}
        }
        let mut arriving = Arriving::new(&mut incoming, &member);
        let path = member.path.as_slice();
        match Part::of(path) {
            Part::BackupLabel => backup_label = arriving.whole().await?,
            Part::TablespaceMap => tablespace_map = arriving.whole().await?,
            Part::LeftOut => arriving.pass_over().await?,
            Part::Control => {
                let bytes = arriving.whole().await?;
                // It may have been in the middle of a write.
                let torn = |_| TakeError::Incomplete { what: "its control file came damaged" };
                control = Some(ControlFile::parse(&bytes).map_err(torn)?);
                sorter.push(&storing.store_bytes(path, member.mode, &bytes).await?)?;
            }
            Part::File => {
                let parent = match &former {
                    Some(former) => former.find(path)?,
                    None => None,
                };
                let parent = parent.filter(|parent| parent.kind == pgherd_backup::map::Kind::File);
                let stored = storing.store_content(path, member.mode, &mut arriving, parent.as_ref()).await?;
                if !stored.damaged.is_empty() && damaged.len() < MAX_DAMAGED {
                    let path = String::from_utf8_lossy(path).into_owned();
                    tracing::warn!(path, pages = ?stored.damaged, "pages of the server look damaged");
                    damaged.push(Damaged { path, pages: stored.damaged });
                }
                sorter.push(&stored.entry)?;
            }
        }
        let sum = arriving.sum;
        sent.file(path, sum)?;
    };
    sent.compare()?;
    let control = control.ok_or(TakeError::Incomplete { what: "its control file has not come" })?;
    if backup_label.is_empty() {
        return Err(TakeError::Incomplete { what: "its backup_label has not come" });
    }
    let packs = storing.into_packs().finish().await?;
    Ok(Received { packs, entries: sorter.finish()?, control, backup_label, tablespace_map, stop, damaged })
}
