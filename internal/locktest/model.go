package locktest

import (
	"fmt"
	"time"

	"github.com/anishathalye/porcupine"
)

// kind is what an operation was, and what came of it: the answers are part of it.
type kind uint8

const (
	locked   kind = iota // LockFor, granted
	refused              // LockFor, told which generation holds the lock
	extended             // Extend
	released             // CloseLockedUntil, nil
	forced               // ForceUnlock, nil
	notHeld              // CloseLockedUntil or ForceUnlock, told that the generation is over
	read                 // LockedUntil
	expired              // nobody's: the time of a generation is over
)

var kinds = [...]string{"locked", "refused", "extended", "released", "forced", "not held", "read", "expired"}

type input struct {
	op    kind
	fence uint64
	held  bool          // what read was told
	ttl   time.Duration // for the recorder
}

// register is the lock: the newest generation, and whether it is held.
type register struct {
	fence  uint64
	held   bool
	forced bool // how it ended
}

var model = porcupine.Model{
	Init: func() any { return register{} },
	Step: func(state, in, _ any) (bool, any) {
		s, op := state.(register), in.(input)
		holds := s.held && s.fence == op.fence
		switch op.op {
		case locked:
			return !s.held && op.fence > s.fence, register{fence: op.fence, held: true}
		case refused, extended:
			return holds, s
		case forced:
			if !holds { // somebody else has forced it before
				return s.fence > op.fence || s.fence == op.fence && s.forced, s
			}
			return true, register{fence: s.fence, forced: true}
		case released, expired:
			return holds, register{fence: s.fence}
		case notHeld:
			return !holds && s.fence >= op.fence, s
		case read:
			return s.held == op.held, s
		}
		return false, s
	},
	DescribeOperation: func(in, _ any) string {
		op := in.(input)
		return fmt.Sprintf("%s %d %v", kinds[op.op], op.fence, op.held)
	},
}
