package dchannel

import (
	"context"
	"time"
)

// Locker is an optional interface of a [Backend] that can tell for how long a channel
// is locked. Without it, the lock calls of a Channel return errors.ErrUnsupported.
//
// # The model
//
// A channel has one lock, apart from its log. Who acquires it begins a generation,
// numbered by a fence: fences of one channel grow strictly, also over a flush, a
// restart or a lost data directory. A generation is held until it is released, until
// its time is over by the server's clock, or until somebody ends it by force. Every
// generation ends once, in one way, and the backend remembers how the last two ended
// for at least a day (a memory that expires by itself).
//
//	FREE ── Acquire ──► HELD(fence) ── Release ──► Released
//	                      │  └── Extend: HELD(fence), a new deadline; never begins one
//	                      ├── the time is over ──► Expired
//	                      └── EndLock ──► Forced or Closed
//
// Time is the server's alone: no absolute client time goes over the wire, and no
// client decides that a lock has expired. What a method returns is the state right
// behind the step that it took, in one atomic step with it.
//
// The rules for errors and contexts are those of [Backend]. ErrUncertain is for
// writes whose reply was lost: the core repeats Acquire, Extend, Release and EndLock,
// so each must be idempotent by its token or fence.
type Locker interface {
	// Acquire begins a generation for l if the channel is free. If the newest
	// generation is held under l.Token already, it is left as it is. The state tells:
	// Held and Mine mean that l holds the lock; otherwise it is somebody else's.
	//
	// A token is used for one generation: when that has ended, Acquire with the token
	// reports it (Mine, not Held) and begins nothing.
	//
	// With l.Fair, and the lock not free, the caller lines up under its token, first
	// come, first served, and the lock passes to the first in line at the end of the
	// generation, in the same step (or to nobody, if there is none). Its WatchLock hint
	// is called; Acquire under the same token then says Held and Mine. A place is lost
	// when its token has not called Acquire for l.TTL. A lock that is free but has a
	// line belongs to the first in line. A backend that cannot do it returns
	// errors.ErrUnsupported and does nothing.
	//
	// ErrChanClosed if the channel's log has ended.
	Acquire(ctx context.Context, channel string, l Lease) (LockState, error)

	// Extend sets the held generation's deadline to ttl from now, if it is the
	// token's. If it is not (any more), nothing happens; the state tells.
	Extend(ctx context.Context, channel string, token ID, ttl time.Duration) (LockState, error)

	// Release ends the held generation as Released, if it is the token's, and takes the
	// token out of the line. If it is not held by the token, nothing else happens; the
	// state tells.
	Release(ctx context.Context, channel string, token ID) (LockState, error)

	// EndLock ends the held generation, if its fence is the given one (0: any), with
	// the outcome LockForced or LockClosed.
	EndLock(ctx context.Context, channel string, fence uint64, outcome LockOutcome) (LockState, error)

	// LockState reads the state.
	LockState(ctx context.Context, channel string) (LockState, error)

	// WatchLock calls hint, which returns at once, whenever the state may have changed
	// by Acquire (a hand-over in a line), Release, EndLock, or expiry where the server
	// tells, and whenever hints may have been missed (a reconnect; Backend.Close, so
	// that those who wait learn of it). It is live when it returns. Hints may be late, doubled or without cause. At most one watch for each
	// channel and backend value at a time is asked for; it resumes by itself.
	WatchLock(ctx context.Context, channel string, hint func()) (Subscription, error)
}

// Lease is what a holder asks for.
type Lease struct {
	// Token is the holder's identity for one generation.
	Token ID
	// TTL is for how long: the backend rounds it up to its granularity.
	TTL time.Duration
	// Info is told to others, as LockState.Info: at most MaxLockInfo bytes of UTF-8.
	Info string
	// Fair asks to line up.
	Fair bool
}

// MaxLockInfo bounds Lease.Info, in bytes.
const MaxLockInfo = 255

// LockState is a lock at one moment.
type LockState struct {
	// Fence is the newest generation's; 0 if the backend knows of none.
	Fence uint64
	// Held says that the newest generation is held.
	Held bool
	// Mine says that the newest generation is, or was, the one of the token in the
	// call.
	Mine bool
	// TTL is the effective time that the newest generation was given last: what was
	// asked for, rounded up.
	TTL time.Duration
	// Remaining is how much of it is left, by the server's clock, rounded up to a
	// millisecond: 0 if, and only if, not Held.
	Remaining time.Duration
	// Info is the holder's.
	Info string
	// Token is the newest generation's. A backend may leave it zero; who stands in line
	// then calls Acquire to learn whether it is its turn, whenever the lock changes hands.
	Token ID
	// Ended tells how the newest generations ended, newest first; those that are
	// remembered, which are at least the last two.
	Ended []LockEnd
	// Waiting is how many stand in line, where the backend knows.
	Waiting int
}

// LockEnd is the end of a generation.
type LockEnd struct {
	Fence   uint64
	Outcome LockOutcome
}

// LockOutcome is how a generation ended.
type LockOutcome uint8

// The outcomes. The last two are not stored: they are answers to a question.
const (
	// LockReleased: by its holder.
	LockReleased LockOutcome = iota + 1
	// LockExpired: its time was over.
	LockExpired
	// LockForced: ended by somebody else, on purpose.
	LockForced
	// LockClosed: the channel was closed.
	LockClosed
	// LockNone: there was nothing to wait for.
	LockNone
	// LockSuperseded: it ended, before the last ones whose end is remembered.
	LockSuperseded
)

// String returns the outcome in lower case.
func (o LockOutcome) String() string {
	switch o {
	case LockReleased:
		return "released"
	case LockExpired:
		return "expired"
	case LockForced:
		return "forced"
	case LockClosed:
		return "closed"
	case LockNone:
		return "not locked"
	case LockSuperseded:
		return "superseded"
	}
	return "held"
}
