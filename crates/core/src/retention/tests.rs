//! Retention: each rule by itself, and what a window promises over many random pasts.

use super::*;

const NOW: i64 = 1_000 * DAY_S;

/// A backup that ended so many days ago.
fn ago(days: i64) -> Backup<i64> {
    let ended_s = NOW - days * DAY_S;
    let day = ended_s.div_euclid(DAY_S);
    let calendar = Calendar { day, week: day.div_euclid(7), month: day.div_euclid(30) };
    Backup { id: -days, ended_s, calendar, is_whole: true, leads_to_present: true, keep: None }
}

fn policy(text: &str) -> Retention {
    Retention { policy: Some(text.parse().unwrap()), minimum_redundancy: 0, tiers: Tiers::default() }
}

/// Label of each, by its age in days.
fn labels(retention: &Retention, backups: &[Backup<i64>]) -> Vec<(i64, &'static str)> {
    let short = |label| match label {
        Label::Valid => "valid",
        Label::Obsolete => "obsolete",
        Label::PotentiallyObsolete => "potentially",
        Label::None => "none",
        Label::KeepFull => "full",
        Label::KeepStandalone => "standalone",
    };
    retention.judge(NOW, backups).iter().map(|verdict| (-verdict.id, short(verdict.label))).collect()
}

#[test]
fn a_policy_is_read_in_barmans_language() {
    for (text, reads) in [
        ("REDUNDANCY 3", "REDUNDANCY 3"),
        ("redundancy 1", "REDUNDANCY 1"),
        ("Recovery  Window of 7 days", "RECOVERY WINDOW OF 7 DAYS"),
        ("RECOVERY WINDOW OF 1 MONTH", "RECOVERY WINDOW OF 1 MONTHS"),
        ("RECOVERY WINDOW OF 4 WEEKS", "RECOVERY WINDOW OF 4 WEEKS"),
    ] {
        let policy: Policy = text.parse().unwrap();
        assert_eq!(policy.to_string(), reads);
        assert_eq!(policy.to_string().parse::<Policy>().unwrap(), policy);
    }
    for wrong in [
        "",
        "REDUNDANCY",
        "REDUNDANCY 0",
        "REDUNDANCY -1",
        "REDUNDANCY 3 DAYS",
        "REDUNDANCY 4294967296",
        "RECOVERY WINDOW OF 7",
        "RECOVERY WINDOW OF 0 DAYS",
        "RECOVERY WINDOW OF 7 HOURS",
        "RECOVERY WINDOW OF 4294967295 MONTHS",
        "7 DAYS",
    ] {
        assert!(wrong.parse::<Policy>().is_err(), "{wrong:?} must not be a policy");
    }
}

#[test]
fn redundancy_keeps_the_newest() {
    let backups = [ago(1), ago(2), ago(3), ago(4)];
    let expected = [(1, "valid"), (2, "valid"), (3, "obsolete"), (4, "obsolete")];
    assert_eq!(labels(&policy("REDUNDANCY 2"), &backups), expected);
    let more = Retention { minimum_redundancy: 3, ..policy("REDUNDANCY 2") };
    assert_eq!(labels(&more, &backups)[2], (3, "valid"), "raised to the minimum, as in Barman");
}

#[test]
fn a_backup_without_its_wal_takes_no_other_ones_place() {
    let broken = Backup { is_whole: false, leads_to_present: false, ..ago(1) };
    let backups = [broken.clone(), ago(2), ago(3), Backup { id: -4, ..Backup { is_whole: false, ..ago(4) } }];
    let expected = [(1, "none"), (2, "valid"), (3, "valid"), (4, "obsolete")];
    assert_eq!(labels(&policy("REDUNDANCY 2"), &backups), expected);
    assert_eq!(
        labels(&policy("RECOVERY WINDOW OF 2 DAYS"), &[broken, ago(3), ago(4)]),
        [(1, "none"), (3, "valid"), (4, "obsolete")]
    );
}

#[test]
fn a_window_keeps_the_one_before_it() {
    let backups = [ago(1), ago(6), ago(8), ago(15)];
    let expected = [(1, "valid"), (6, "valid"), (8, "valid"), (15, "obsolete")];
    assert_eq!(labels(&policy("RECOVERY WINDOW OF 1 WEEK"), &backups), expected);
    assert_eq!(
        labels(&policy("RECOVERY WINDOW OF 1 WEEK"), &[ago(100)]),
        [(100, "valid")],
        "the only one there is"
    );
    let exactly = labels(&policy("RECOVERY WINDOW OF 7 DAYS"), &[ago(7), ago(8)]);
    assert_eq!(exactly, [(7, "valid"), (8, "obsolete")], "the beginning of the window is in it");
}

#[test]
fn a_window_is_carried_only_by_a_backup_that_leads_to_the_present() {
    let left = |days| Backup { leads_to_present: false, ..ago(days) };
    let backups = [ago(1), left(8), left(9), ago(10), ago(11)];
    let verdicts = policy("RECOVERY WINDOW OF 1 WEEK").judge(NOW, &backups);
    let kept: Vec<i64> =
        verdicts.iter().filter(|verdict| !verdict.goes()).map(|verdict| -verdict.id).collect();
    assert_eq!(kept, [1, 8, 9, 10]);
    assert_eq!(
        verdicts[1].reason.to_string(),
        "newer backups that are older than RECOVERY WINDOW OF 1 WEEKS are on lines of history that were left"
    );
}

#[test]
fn a_minimum_holds_back_what_a_window_lets_go() {
    let retention = Retention { minimum_redundancy: 3, ..policy("RECOVERY WINDOW OF 1 DAY") };
    let backups = [ago(2), ago(3), ago(4), ago(5)];
    let expected = [(2, "valid"), (3, "potentially"), (4, "potentially"), (5, "obsolete")];
    assert_eq!(labels(&retention, &backups), expected);
    let mut backups = backups;
    backups[1].is_whole = false;
    let expected = [(2, "valid"), (3, "obsolete"), (4, "potentially"), (5, "potentially")];
    assert_eq!(labels(&retention, &backups), expected, "one that cannot be restored is no redundancy");
}

#[test]
fn what_is_kept_by_hand_stays_and_counts() {
    let mut backups = [ago(1), ago(2), ago(3), ago(4)];
    backups[2].keep = Some(Keep::Full);
    backups[3].keep = Some(Keep::Standalone);
    let verdicts = policy("REDUNDANCY 1").judge(NOW, &backups);
    let seen: Vec<_> = verdicts.iter().map(|verdict| (verdict.label.to_string(), verdict.wal)).collect();
    let expected = [
        ("VALID", Some(Wal::Since)),
        ("OBSOLETE", None),
        ("KEEP:FULL", Some(Wal::Since)),
        ("KEEP:STANDALONE", Some(Wal::Own)),
    ];
    assert_eq!(seen, expected.map(|(label, wal)| (label.to_owned(), wal)));
    backups[0].keep = Some(Keep::Standalone);
    let verdicts = policy("REDUNDANCY 1").judge(NOW, &backups);
    assert_eq!(verdicts[0].wal, Some(Wal::Since), "moments since are restored from it all the same");
}

#[test]
fn the_last_of_each_day_week_and_month_stays_with_its_own_wal() {
    let tiers = Tiers { daily: 3, weekly: 2, monthly: 0 };
    let retention = Retention { tiers, ..policy("REDUNDANCY 1") };
    let mut evening = ago(2);
    (evening.id, evening.ended_s) = (-20, evening.ended_s + 3600);
    let backups = [ago(1), ago(2), evening, ago(3), ago(4), ago(9), ago(30)];
    let verdicts = retention.judge(NOW, &backups);
    let kept: Vec<_> =
        verdicts.iter().filter(|verdict| !verdict.goes()).map(|verdict| (-verdict.id, verdict.wal)).collect();
    // Weeks of seven days since 1970: days 1 to 6 ago are in the same.
    let week = |days: i64| ago(days).calendar.week;
    assert_eq!((week(1), week(4), week(9)), (142, 142, 141));
    assert_eq!(kept, [(1, Some(Wal::Since)), (20, Some(Wal::Own)), (3, Some(Wal::Own)), (9, Some(Wal::Own))]);
    let of = verdicts.iter().find(|verdict| verdict.id == -9).unwrap();
    assert_eq!(of.reason.to_string(), "the last of its week, of 2 that are kept");
}

#[test]
fn without_a_policy_or_with_a_wrong_clock_nothing_goes() {
    let none = Retention { policy: None, minimum_redundancy: 1, tiers: Tiers::default() };
    assert_eq!(labels(&none, &[ago(1), ago(1000)]), [(1, "none"), (1000, "none")]);
    let verdicts = policy("REDUNDANCY 1").judge(NOW, &[ago(-1), ago(1), ago(2)]);
    assert!(verdicts.iter().all(|verdict| !verdict.goes() && verdict.reason == Reason::ClockIsWrong));
    let mut nearly = ago(0);
    nearly.ended_s += CLOCK_TOLERANCE_S;
    let verdicts = policy("REDUNDANCY 1").judge(NOW, &[nearly, ago(1)]);
    assert!(verdicts[1].goes(), "clocks of two hosts are never quite the same");
}

#[test]
fn a_backup_is_deleted_by_hand_only_if_enough_are_left() {
    let retention = Retention { minimum_redundancy: 1, ..policy("REDUNDANCY 1") };
    let mut backups = [ago(1), ago(2)];
    assert_eq!(retention.may_delete(-1, &backups), Ok(()));
    assert_eq!(
        retention.may_delete(-1, &backups[..1]).unwrap_err().to_string(),
        "0 would be left, and minimum_redundancy is 1"
    );
    backups[1].is_whole = false;
    assert!(retention.may_delete(-1, &backups).is_err(), "what is left could not be restored");
    assert_eq!(retention.may_delete(-2, &backups), Ok(()), "and that may go");
    backups[1].keep = Some(Keep::Full);
    assert_eq!(retention.may_delete(-2, &backups).unwrap_err().to_string(), "it is kept by hand");
}

/// Numbers that look random and are always the same: a linear congruence, of which the high bits are taken.
struct Draws(u64);

impl Draws {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Every hour of the window that could be restored before can be restored after, and so many backups are left as must be, whatever
/// WAL is missing where, and however often the cluster was recovered to an earlier moment.
#[test]
fn case_28_what_a_window_promises_is_kept() {
    const HOURS: u64 = 40 * 24;
    let (mut went, mut branched) = (0, 0);
    for seed in 0..2_000 {
        let mut draws = Draws(seed);
        let gaps: Vec<u64> = (0..draws.below(4)).map(|_| draws.below(HOURS)).collect();
        // At the end of each the cluster was recovered to its beginning: what was between is of another line.
        let left: Vec<(u64, u64)> = (0..draws.below(3))
            .map(|_| (draws.below(HOURS), draws.below(200)))
            .map(|(from, hours)| (from, (from + hours).min(HOURS - 1)))
            .collect();
        let is_left = |hour: u64| left.iter().any(|(from, to)| (*from + 1..=*to).contains(&hour));
        let backups: Vec<(u64, Backup<i64>)> = (0..draws.below(20))
            .map(|number| {
                let hour = draws.below(HOURS);
                let backup = Backup {
                    id: number as i64,
                    ended_s: NOW - (HOURS - hour) as i64 * 3600,
                    is_whole: draws.below(8) > 0,
                    leads_to_present: !is_left(hour),
                    ..ago(0)
                };
                (hour, backup)
            })
            .collect();
        let minimum_redundancy = draws.below(4) as u32;
        let days = 1 + draws.below(20) as u32;
        let retention = Retention {
            policy: Some(Policy::Window { count: days, unit: Unit::Days }),
            minimum_redundancy,
            tiers: Tiers::default(),
        };
        let only: Vec<Backup<i64>> = backups.iter().map(|(_, backup)| backup.clone()).collect();
        let verdicts = retention.judge(NOW, &only);
        assert_eq!(verdicts.len(), backups.len());
        let stays = |id: i64| verdicts.iter().any(|verdict| verdict.id == id && !verdict.goes());
        let restores = |at: u64, backup: &Backup<i64>, hour: u64| {
            let missing = gaps.iter().any(|gap| (at..hour).contains(gap) && !is_left(*gap));
            backup.is_whole && !is_left(at) && at <= hour && !missing
        };
        for hour in (HOURS.saturating_sub(u64::from(days) * 24)..HOURS).filter(|hour| !is_left(*hour)) {
            let before = backups.iter().any(|(at, backup)| restores(*at, backup, hour));
            let after = backups.iter().any(|(at, backup)| stays(backup.id) && restores(*at, backup, hour));
            assert_eq!(before, after, "seed {seed}: hour {hour} of {HOURS}, gaps {gaps:?}, left {left:?}");
        }
        let whole = only.iter().filter(|backup| backup.is_whole).count();
        let kept = only.iter().filter(|backup| backup.is_whole && stays(backup.id)).count();
        assert!(kept >= whole.min(minimum_redundancy as usize), "seed {seed}");
        went += verdicts.iter().filter(|verdict| verdict.goes()).count();
        branched += only.iter().filter(|backup| !backup.leads_to_present).count();
    }
    assert!(went > 1_000 && branched > 1_000, "{went} went, {branched} were left: nothing was shown");
}
