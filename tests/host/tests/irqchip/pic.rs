// SPDX-License-Identifier: GPL-2.0

//! The 8259s: no sequence of accesses breaks them, and INTR says what an acknowledge gives.

use proptest::prelude::*;
use rvisor_core::irqchip::pic::{DualPic, PicChip, PicState};
use rvisor_core::irqchip::LineSource;

#[derive(Clone, Debug)]
enum Step {
    Line(u8, u8, bool),
    Read(u16),
    Write(u16, u8),
    Acknowledge,
    State(bool, [u8; 16]),
}

const PORTS: [u16; 7] = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x22];

fn port() -> impl Strategy<Value = u16> {
    (0..PORTS.len()).prop_map(|index| PORTS[index])
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0u8..18, 0u8..3, any::<bool>()).prop_map(|(n, s, l)| Step::Line(n, s, l)),
        3 => port().prop_map(Step::Read),
        6 => (port(), any::<u8>()).prop_map(|(port, value)| Step::Write(port, value)),
        4 => Just(Step::Acknowledge),
        1 => any::<(bool, [u8; 16])>().prop_map(|(master, bytes)| Step::State(master, bytes)),
    ]
}

fn state_of(b: [u8; 16]) -> PicState {
    PicState {
        last_irr: b[0],
        irr: b[1],
        imr: b[2],
        isr: b[3],
        priority_add: b[4],
        irq_base: b[5],
        read_reg_select: b[6],
        poll: b[7],
        special_mask: b[8],
        init_state: b[9],
        auto_eoi: b[10],
        rotate_on_auto_eoi: b[11],
        special_fully_nested_mode: b[12],
        init4: b[13],
        elcr: b[14],
        elcr_mask: b[15],
    }
}

proptest! {
    #![proptest_config(super::config())]

    #[test]
    fn any_sequence_keeps_the_controllers_sound(
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        let mut pic = DualPic::new();
        for step in steps {
            match step {
                Step::Line(line, source, level) => {
                    pic.set_line(line, LineSource::new(source).unwrap(), level);
                }
                Step::Read(port) => {
                    prop_assert_eq!(pic.read_port(port).is_some(), port != 0x22);
                }
                Step::Write(port, value) => {
                    prop_assert_eq!(pic.write_port(port, value), port != 0x22);
                }
                Step::Acknowledge => {
                    let output = pic.output();
                    let [master, slave] = [PicChip::Master, PicChip::Slave].map(|c| pic.state(c));
                    let vector = pic.acknowledge().0;
                    let (base, line) = (vector & 0xf8, vector & 7);
                    let requests = |state: PicState| state.irr & !state.imr;
                    let from_master = base == master.irq_base
                        && line != 2
                        && requests(master) & (1 << line) != 0;
                    let from_slave = base == slave.irq_base
                        && requests(master) & 4 != 0
                        && (line == 7 || requests(slave) & (1 << line) != 0);
                    if output {
                        prop_assert!(from_master || from_slave);
                    } else {
                        prop_assert_eq!(vector, master.irq_base | 7);
                    }
                }
                Step::State(master, bytes) => {
                    let chip = if master { PicChip::Master } else { PicChip::Slave };
                    pic.set_state(chip, &state_of(bytes));
                }
            }
            for (chip, mask) in [(PicChip::Master, 0xf8), (PicChip::Slave, 0xde)] {
                let state = pic.state(chip);
                prop_assert_eq!(state.elcr & !mask, 0);
                prop_assert_eq!(state.elcr_mask, mask);
                prop_assert_eq!(state.irq_base & 7, 0);
                prop_assert!(state.priority_add < 8 && state.init_state < 4);
            }
            // INTR never rises without an unmasked request.
            let master = pic.state(PicChip::Master);
            if pic.output() {
                prop_assert_ne!(master.irr & !master.imr, 0);
            } else if master.isr == 0 {
                prop_assert_eq!(master.irr & !master.imr, 0);
            }
            let mut copy = pic.clone();
            for chip in [PicChip::Master, PicChip::Slave] {
                copy.set_state(chip, &pic.state(chip));
            }
            prop_assert_eq!(copy.output(), pic.output());
        }
    }

    /// In fixed priority the interrupts come in the order of their lines, each once.
    #[test]
    fn edges_come_once_in_the_order_of_priority(lines: u16) {
        let mut pic = DualPic::new();
        for (port, value) in [
            (0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0),
            (0xa0, 0x11), (0xa1, 0x38), (0xa1, 2), (0xa1, 1), (0xa1, 0),
        ] {
            pic.write_port(port, value);
        }
        // Line 2 is the cascade.
        let lines = lines & !4;
        let mut expected = Vec::new();
        for line in (0..16u8).filter(|line| lines & (1 << line) != 0) {
            pic.set_line(line, LineSource::USERSPACE, true);
            expected.push(line);
        }
        // 0, 1, then 8 to 15 at line 2, then 3 to 7.
        expected.sort_by_key(|&line| if line >= 8 { 2 } else { line });
        let mut came = Vec::new();
        while pic.output() {
            let line = pic.acknowledge().0 - 0x30;
            came.push(line);
            if line >= 8 {
                pic.write_port(0xa0, 0x20);
            }
            pic.write_port(0x20, 0x20);
            prop_assert!(came.len() <= 16);
        }
        prop_assert_eq!(came, expected);
    }
}
