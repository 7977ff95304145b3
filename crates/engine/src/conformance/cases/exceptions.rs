//! Exceptions that instructions raise: vector, error code, where the frame points (SDM vol. 3A 6.15).

use super::prelude::*;

pub fn add(suite: &mut Suite) {
    suite.add("UD2 is #UD", EVERY_MODE, |g| g.run(|a| a.ud2())?.fault(vector::UD));
    suite.add("INT3 is a trap", &[Mode::Real, Mode::Protected, Mode::Compat, Mode::Long], |g| {
        g.run(|a| a.int3())?.trap(vector::BP)
    });
    suite.add("nothing happens", EVERY_MODE, |g| g.run(|a| a.nop())?.done());
}
