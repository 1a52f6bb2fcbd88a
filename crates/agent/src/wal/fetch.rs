//! One file of WAL out of a repository, and the ones that recovery will ask for next.
//!
//! PostgreSQL asks for one segment at a time and waits. So the first call leaves a process behind that fetches the next segments
//! into a spool beside, several at a time; the calls that follow find theirs there. See `spool`.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use pgherd_backup::document::ReadError;
use pgherd_backup::wal::{Fetched as Archived, Segment, Wal, WalError};
use tokio::runtime::Handle;

use super::spool::Spool;
use super::{FileError, FileName};

/// Segments of the usual size that are fetched at the same time; of larger ones fewer.
const AT_ONCE: usize = 4;
/// How much is fetched ahead, and so how much space a spool takes.
pub const AHEAD_BYTES: u64 = 256 * 1024 * 1024;

/// Whoever fetches ahead and has not brought a segment by then does not keep recovery waiting.
const COMES_WITHIN: Duration = Duration::from_secs(10);
/// Between two looks whether it has come.
const LOOK: Duration = Duration::from_millis(2);

/// How a fetch came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// The file is there. From `ahead` on somebody should fetch into the spool now.
    Found { ahead: Option<String> },
    /// The repository is there, and has no such file.
    Absent,
}

/// Brings the file `name` to `to`, which is there as a whole or not at all.
pub(super) async fn fetch<A: Wal>(
    archive: &A,
    data_dir: &Path,
    name: &str,
    to: &Path,
) -> Result<Fetched, FileError> {
    let segment = match FileName::parse(name, archive.segments())? {
        FileName::Segment(segment) => segment,
        FileName::History(timeline) => {
            return match archive.history_file(timeline).await {
                Ok((_, content)) => put(to, &content).map(|()| Fetched::Found { ahead: None }),
                Err(error) if error.is_absent() => Ok(Fetched::Absent),
                Err(error) => Err(error.into()),
            };
        }
        // PostgreSQL never recovers from these.
        FileName::Partial(_) | FileName::Backup => return Ok(Fetched::Absent),
    };
    let spool = Spool::of(data_dir);
    let file = archive.segments().file_name(segment);
    if !taken(&spool, &file, to).await? {
        match archive.fetch(segment).await {
            // Of the last one there may be a beginning, at whose end recovery ends.
            Ok(Archived::Whole(content) | Archived::Beginning { content, .. }) => put(to, &content)?,
            Err(error) if error.is_absent() => {
                spool.remove();
                return Ok(Fetched::Absent);
            }
            Err(error) => return Err(error.into()),
        }
    }
    let next = archive.segments().file_name(Segment { number: segment.number + 1, ..segment });
    // Half of what is fetched ahead is used up before it is filled again.
    let middle = Segment { number: segment.number + (ahead(archive) / 2).max(1), ..segment };
    let is_filled = spool.has(&archive.segments().file_name(middle)) || spool.is_coming(&next);
    Ok(Fetched::Found { ahead: (!is_filled).then_some(next) })
}

/// What another process is about to have fetched is not fetched twice: both would be late.
async fn taken(spool: &Spool, file: &str, to: &Path) -> Result<bool, FileError> {
    let began = Instant::now();
    loop {
        // Asked first: it may come between the two.
        let is_coming = spool.is_coming(file) && began.elapsed() < COMES_WITHIN;
        if spool.take(file, to)? {
            return Ok(true);
        }
        if !is_coming {
            return Ok(false);
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn ahead<A: Wal>(archive: &A) -> u64 {
    (AHEAD_BYTES / u64::from(archive.segments().bytes())).max(1)
}

/// Fills the spool with the segment `first` and what comes behind it, until there is enough or no more. Only one process does so
/// at a time; `false`: another one does.
pub(super) async fn fill<A: Wal + Clone + 'static>(
    archive: &A,
    data_dir: &Path,
    first: &str,
) -> Result<bool, FileError> {
    let FileName::Segment(first) = FileName::parse(first, archive.segments())? else { return Ok(false) };
    let spool = Spool::of(data_dir);
    let segments = archive.segments();
    let numbers = first.number..first.number + ahead(archive);
    let last = Segment { number: numbers.end - 1, ..first };
    let Some(filling) = spool.fill(&segments.file_name(first), &segments.file_name(last))? else {
        return Ok(false);
    };
    // What recovery has passed is of no use any more.
    filling.forget_before(&segments.file_name(first))?;
    let wanted = numbers.map(|number| Segment { number, ..first });
    let wanted = wanted.filter(|segment| !spool.has(&segments.file_name(*segment)));
    let at_once = AT_ONCE.min(ahead(archive) as usize);
    let contents = futures_util::stream::iter(wanted)
        // Whole ones only: what there is of the last one grows.
        .map(|segment| async move { (segment, on_a_thread(archive, segment).await) })
        .buffered(at_once)
        .map(|(segment, content)| match content? {
            Ok(content) => Ok(Some((segment, content))),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) => Err(FileError::from(error)),
        })
        // What is behind the first one that is absent may come later; recovery asks for that one first.
        .try_take_while(|content| futures_util::future::ready(Ok(content.is_some())));
    contents
        .try_for_each(|content| {
            let put = content
                .map_or(Ok(()), |(segment, content)| filling.put(&segments.file_name(segment), &content));
            futures_util::future::ready(put)
        })
        .await?;
    filling.end(&spool);
    Ok(true)
}

/// Decompressing takes longer than reading, and several processors do it beside each other.
async fn on_a_thread<A: Wal + Clone + 'static>(
    archive: &A,
    segment: Segment,
) -> Result<Result<Bytes, ReadError>, FileError> {
    let (archive, runtime) = (archive.clone(), Handle::current());
    let reading = tokio::task::spawn_blocking(move || runtime.block_on(archive.segment(segment)));
    reading.await.map_err(|lost| WalError::Lost { why: lost.to_string() }.into())
}

/// By renaming, so that nobody finds half of it. Not flushed: whoever asked for it does that, or asks again after a crash.
fn put(to: &Path, content: &Bytes) -> Result<(), FileError> {
    let mut unfinished = to.as_os_str().to_owned();
    unfinished.push(".pgherd");
    let unfinished = Path::new(&unfinished);
    fs::write(unfinished, content).map_err(FileError::file("write", unfinished))?;
    fs::rename(unfinished, to).map_err(FileError::file("rename", unfinished))
}
