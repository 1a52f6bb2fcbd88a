//! What monitoring asks about a repository: can everything be restored that is believed to be, and is it as new as it should be.
//!
//! Items have Barman's names where it has them. Looks at names, manifests and ages; what is in the objects is `verify`'s. Hazard: an OK that
//! nobody has looked for; so what cannot be looked at is unknown.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use pgherd_api::backup::BackupStatus;
use pgherd_api::report::{CheckItem, CheckReport, CheckState};
use pgherd_backup::manifest::{FoundBy, Manifest};
use pgherd_backup::name::{Kind, Name};
use pgherd_backup::wal::{Archive, Segment};

use super::catalog::{self, Catalog, CatalogError};

/// A backup that has not come to its end after so long is nobody's any more.
const FORGOTTEN: Duration = Duration::from_secs(24 * 3600);
const REDUNDANCY: &str = "minimum redundancy requirements";
const CREATE: &str = "pgherd backup create takes a backup";

/// What is expected.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    pub minimum_redundancy: u32,
    pub backup_maximum_age: Option<Duration>,
    pub backup_minimum_bytes: Option<u64>,
    pub wal_maximum_age: Option<Duration>,
}

/// Looks at one cluster of a repository.
pub async fn check(catalog: &Catalog, expected: &Expected) -> Result<CheckReport, CatalogError> {
    let now = Timestamp::now();
    let told = catalog::list(catalog).await?;
    let of = |status| told.backups.iter().filter(move |backup| backup.status == status);
    let mut checks = vec![ok("repository", format!("{} can be read", told.repository))];

    let whole = of(BackupStatus::Done).filter(|backup| backup.can_be_restored == Some(true)).count();
    let lacking: Vec<&str> = of(BackupStatus::Done)
        .filter(|backup| backup.can_be_restored != Some(true))
        .map(|backup| backup.id.as_str())
        .collect();
    checks.push(match lacking.as_slice() {
        [] => ok("backup validity", format!("all WAL of {whole} is there")),
        lacking => critical(
            "backup validity",
            format!("WAL is missing that makes {} consistent", lacking.join(", ")),
            "in a herd all nodes are asked for it every five minutes, and pgherd status says what came of it; else pgherd wal push archives it from a server \
             that still has it, or take a new backup",
        ),
    });
    let minimum = expected.minimum_redundancy as usize;
    let have = format!("have {whole} backups, expected at least {minimum}");
    let redundancy = match whole >= minimum {
        true => ok(REDUNDANCY, have),
        false => critical(REDUNDANCY, have, CREATE),
    };
    checks.push(measured(redundancy, format!("backups={whole}")));
    checks.push(age(catalog, expected, now));
    checks.push(size(catalog, expected));
    checks.extend(unexplained(catalog));
    checks.push(match of(BackupStatus::Failed).count() {
        0 => ok("failed backups", "there are none".to_owned()),
        failed => warning(
            "failed backups",
            format!("{failed} did not come to their end"),
            "pgherd backup list says which; pgherd backup delete ends the warning",
        ),
    });
    let begun = |id: &str| civil(id).map(|at| now.duration_since(at));
    let forgotten: Vec<&str> = of(BackupStatus::Started)
        .map(|backup| backup.id.as_str())
        .filter(|id| begun(id).is_none_or(|since| since > signed(FORGOTTEN)))
        .collect();
    if !forgotten.is_empty() {
        checks.push(warning(
            "unfinished backups",
            format!("{} have not come to their end for a day", forgotten.join(", ")),
            "pgherd backup expire gives up what nobody takes any more",
        ));
    }
    checks.push(objects(catalog).await?);
    wal(catalog, expected, now, &mut checks).await?;
    checks.push(match (&told.recovery_window, told.gaps.as_slice()) {
        (None, _) => critical("recovery window", "nothing can be restored".to_owned(), CREATE),
        (Some(window), []) => ok(
            "recovery window",
            format!("from {} to {} on timeline {}", window.from, window.to_lsn, window.to_timeline),
        ),
        (Some(_), gaps) => critical(
            "recovery window",
            format!(
                "WAL is missing from {} to {} on timeline {}",
                gaps[0].from, gaps[0].to, gaps[0].timeline
            ),
            "in a herd all nodes are asked for it every five minutes, and pgherd status says what came of it; else pgherd wal push archives it from a server \
             that still has it, or take a new backup",
        ),
    });
    Ok(CheckReport { checks })
}

fn age(catalog: &Catalog, expected: &Expected, now: Timestamp) -> CheckItem {
    const NAME: &str = "backup maximum age";
    let Some(newest) = catalog.manifests().next_back() else {
        return critical(NAME, "there is no backup".to_owned(), CREATE);
    };
    let age = now.duration_since(newest.facts.stopped);
    let text = format!("the last backup, {}, ended at {}", newest.id, catalog::time(newest.facts.stopped));
    let item = match expected.backup_maximum_age {
        Some(maximum) if age > signed(maximum) => {
            critical(NAME, format!("{text}, longer ago than it may"), CREATE)
        }
        _ => ok(NAME, text),
    };
    measured(item, format!("backup_age={}s", age.as_secs().max(0)))
}

fn size(catalog: &Catalog, expected: &Expected) -> CheckItem {
    const NAME: &str = "backup minimum size";
    let Some(newest) = catalog.manifests().next_back() else {
        return critical(NAME, "there is no backup".to_owned(), CREATE);
    };
    let bytes = newest.bytes;
    let item = match expected.backup_minimum_bytes {
        Some(minimum) if bytes < minimum => critical(
            NAME,
            format!("the last backup has {bytes} bytes, and {minimum} are expected"),
            "is it the right server? pgherd backup show last",
        ),
        _ => ok(NAME, format!("the last backup has {bytes} bytes")),
    };
    measured(item, format!("backup_size={bytes}B"))
}

/// Whether WAL and what was read agree, where one was held against the other last.
fn unexplained(catalog: &Catalog) -> Option<CheckItem> {
    const NAME: &str = "changed pages";
    let held = |manifest: &&Manifest| {
        manifest.changes.as_ref().is_some_and(|changes| changes.found_by == FoundBy::Both)
    };
    let checked = catalog.manifests().rev().find(held)?;
    let pages = checked.changes.as_ref().map_or(0, |changes| changes.unexplained);
    let item = match pages {
        0 => ok(NAME, format!("WAL named all that backup {} found changed", checked.id)),
        pages => critical(
            NAME,
            format!("pages had changed in backup {} without a word in WAL: {pages}", checked.id),
            "see the agent's log, or the output of backup create, for which. That backup has them as they are; those before it, back to the last one \
             that read everything, can have older ones. A disk or somebody by hand may have changed them: prove the newest backup with pgherd backup \
             drill, and ask again with backup create --changes both. If WAL never names them, please report it",
        ),
    };
    Some(measured(item, format!("unexplained_pages={pages}")))
}

/// Everything that manifests name is there.
async fn objects(catalog: &Catalog) -> Result<CheckItem, CatalogError> {
    let (store, place) = (catalog.repository.store(), catalog.place);
    let mut there: BTreeSet<Name> = BTreeSet::new();
    for kind in [Kind::Packs, Kind::Maps] {
        there.extend(store.list_all(&place.all(kind)).await?.into_iter().map(|listed| listed.name));
    }
    let named = catalog.manifests().flat_map(|manifest| {
        let packs = manifest.all_packs().map(move |(pack, _)| place.pack(pack.backup, pack.number));
        packs.chain(manifest.maps.iter().map(move |map| place.map(manifest.id, map.number)))
    });
    let lost: BTreeSet<Name> = named.filter(|name| !there.contains(name)).collect();
    Ok(match lost.first() {
        None => ok("objects", format!("{} packs and maps are there", there.len())),
        Some(first) => critical(
            "objects",
            format!("{} are missing that backups need, such as \"{first}\"", lost.len()),
            "restore from another repository, and take a new backup with --full",
        ),
    })
}

async fn wal(
    catalog: &Catalog,
    expected: &Expected,
    now: Timestamp,
    checks: &mut Vec<CheckItem>,
) -> Result<(), CatalogError> {
    const NAME: &str = "WAL archive";
    const HINT: &str = "see pg_stat_archiver and the server's log, or whether the stream runs";
    let Some(archive) = catalog.archive()? else {
        checks.push(unknown(NAME, "without a backup the size of its segments is not known".to_owned()));
        return Ok(());
    };
    let inventory = archive.inventory().await?;
    let newest = inventory.newest_timeline().and_then(|timeline| {
        let (_, number) = inventory.range_of(timeline)?;
        Some(Segment { timeline, number })
    });
    let Some(newest) = newest else {
        checks.push(critical(NAME, "there is no segment on the latest timeline".to_owned(), HINT));
        return Ok(());
    };
    checks.push(age_of(&archive, catalog, newest, expected, now).await?);
    let quarantined = catalog.repository.store().list_all(&catalog.place.all(Kind::Quarantine)).await?.len();
    checks.push(match quarantined {
        0 => ok("archiver errors", "there are none".to_owned()),
        duplicates => critical(
            "archiver errors",
            format!("duplicates: {duplicates}: segments came twice with different contents"),
            "two servers archive into one place; stop the one that is not meant to",
        ),
    });
    Ok(())
}

async fn age_of(
    archive: &Archive,
    catalog: &Catalog,
    newest: Segment,
    expected: &Expected,
    now: Timestamp,
) -> Result<CheckItem, CatalogError> {
    const NAME: &str = "wal maximum age";
    let file = archive.segments().file_name(newest);
    let name = catalog.place.wal(newest.timeline, &file);
    let modified = catalog.repository.store().head(&name).await?.modified;
    let age = now.duration_since(modified);
    let text = format!("the last segment, {file}, came at {}", catalog::time(modified));
    let item = match expected.wal_maximum_age {
        Some(maximum) if age > signed(maximum) => critical(
            NAME,
            format!("{text}, longer ago than it may"),
            "see pg_stat_archiver and the server's log",
        ),
        _ => ok(NAME, text),
    };
    Ok(measured(item, format!("wal_age={}s", age.as_secs().max(0))))
}

/// When a backup was begun, which is its name.
fn civil(id: &str) -> Option<Timestamp> {
    let at = jiff::civil::DateTime::strptime("%Y%m%dT%H%M%S", id).ok()?;
    Some(at.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp())
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

fn item(check: &str, state: CheckState, message: String) -> CheckItem {
    let check = check.to_owned();
    CheckItem { check, cluster: None, node: None, state, message, measure: None, hint: None }
}

fn ok(check: &str, message: String) -> CheckItem {
    item(check, CheckState::Ok, message)
}

fn unknown(check: &str, message: String) -> CheckItem {
    item(check, CheckState::Unknown, message)
}

fn warning(check: &str, message: String, hint: &str) -> CheckItem {
    CheckItem { hint: Some(hint.to_owned()), ..item(check, CheckState::Warning, message) }
}

fn critical(check: &str, message: String, hint: &str) -> CheckItem {
    CheckItem { hint: Some(hint.to_owned()), ..item(check, CheckState::Critical, message) }
}

fn measured(item: CheckItem, measure: String) -> CheckItem {
    CheckItem { measure: Some(measure), ..item }
}
