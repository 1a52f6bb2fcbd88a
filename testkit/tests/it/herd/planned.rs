//! Changes that an operator asks for.

use super::*;

#[test]
fn b10_a_planned_switchover_under_load_loses_nothing() {
    let _alone = alone();
    let herd = Herd::of(&["a", "b", "c"]).start();
    let workload = herd.start_workload();
    let asked_at = Instant::now();
    herd.switch_over(Some("b"));
    assert_eq!(herd.primary(), "b");
    writes_go_on(&workload, asked_at, AT_ONCE);
    herd.wait_until_whole(WHOLE);
    let asked_at = Instant::now();
    herd.switch_over(None);
    assert_ne!(herd.primary(), "b");
    writes_go_on(&workload, asked_at, AT_ONCE);
    all_is_well(&herd, workload);
    herd.assert_quiet(&[JOINING]);
}
