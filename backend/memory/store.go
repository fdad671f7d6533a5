package memory

import (
	"errors"
	"hash/maphash"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dchannel/dchannel"
)

// Store stands for a server: it holds the logs. Make one with [NewStore]; its
// methods may be called from any goroutine.
//
// Locks are taken in this order: Store.mu, Backend.mu, shard.mu, slot.mu. Sinks
// are called under slot.mu.
type Store struct {
	maxRecords int
	maxAge     int64 // milliseconds, as all durations and times of the store
	idleExpiry int64
	badOption  error

	boot      time.Time
	lastEpoch atomic.Uint64
	seed      maphash.Seed
	shards    [64]shard

	// gate is up while the store stands still. It is read under a lock of the slot
	// or shard that is used next, so when stop has passed through all of them
	// nothing is going on any more.
	gate        atomic.Bool
	incarnation dchannel.ID // written only behind the gate

	mu    sync.Mutex // for the fault switches, one at a time
	queue []*waiting // calls that wait for Resume, in order of arrival

	sweep sweeper
}

// shard is a part of the map of slots, with a lock of its own so that publishers
// on different channels do not wait for one another.
type shard struct {
	mu     sync.RWMutex
	slots  map[string]*slot
	forgot int64 // the newest slot.forgot among those that were dropped
	calls  atomic.Uint64
	_      [64]byte // keeps neighbours off this cache line
}

// errPaused tells the caller to come again through Backend.later.
var errPaused = errors.New("the store is paused")

// NewStore returns an empty store.
func NewStore(opts ...Option) *Store {
	s := &Store{
		maxRecords:  DefaultRetentionMessages,
		maxAge:      millis(DefaultRetention),
		idleExpiry:  millis(DefaultIdleExpiry),
		boot:        time.Now(),
		seed:        maphash.MakeSeed(),
		incarnation: dchannel.NewID(),
	}
	for i := range s.shards {
		s.shards[i].slots = make(map[string]*slot)
	}
	for _, o := range opts {
		o(s)
	}
	s.idleExpiry = max(s.idleExpiry, s.maxAge)
	return s
}

// Channels returns how many channels have a log in the store: those that were
// published to or closed, and have not expired or been removed since.
func (s *Store) Channels() int {
	n := 0
	now := s.now()
	s.each(func(sl *slot) {
		sl.expire(now)
		if sl.epoch != 0 {
			n++
		}
	})
	return n
}

// Subscriptions returns how many subscriptions channel has, those of all backends
// together, cut off or not.
func (s *Store) Subscriptions(channel string) int {
	sh := s.shard(channel)
	sh.mu.RLock()
	sl := sh.slots[channel]
	sh.mu.RUnlock()
	if sl == nil {
		return 0
	}
	sl.mu.Lock()
	defer sl.mu.Unlock()
	return len(sl.subs)
}

// Calls returns how many operations have reached the store so far: publishes,
// closes, reads, heads (one a call, however many channels), subscribes and
// removals. While it stands still, nothing is asked of the server.
func (s *Store) Calls() uint64 {
	var n uint64
	for i := range s.shards {
		n += s.shards[i].calls.Load()
	}
	return n
}

// now returns milliseconds since 1970, from the monotonic clock: a step of the
// wall clock must not expire anything.
func (s *Store) now() int64 {
	return s.boot.UnixMilli() + int64(time.Since(s.boot)/time.Millisecond)
}

// nextEpoch returns a number above all earlier ones, also above those of another
// store in an earlier run of the program.
func (s *Store) nextEpoch() uint64 {
	now := uint64(s.boot.UnixMicro() + time.Since(s.boot).Microseconds())
	for {
		last := s.lastEpoch.Load()
		next := max(now, last+1)
		if s.lastEpoch.CompareAndSwap(last, next) {
			return next
		}
	}
}

func (s *Store) shard(channel string) *shard {
	return &s.shards[maphash.String(s.seed, channel)%uint64(len(s.shards))]
}

// enter returns channel's slot, locked; it is made if need be. Leave it by leave.
// With force it passes the gate: for those who hold Store.mu.
func (s *Store) enter(channel string, force bool) (*slot, error) {
	sh := s.shard(channel)
	sh.mu.RLock()
	sl := sh.slots[channel]
	sh.mu.RUnlock()
	for {
		if sl == nil {
			sl = sh.make(s, channel, nil)
		}
		sl.mu.Lock()
		if !sl.gone {
			break
		}
		sl.mu.Unlock()
		sl = sh.make(s, channel, sl)
	}
	if !force && s.gate.Load() {
		s.leave(sl)
		return nil, errPaused
	}
	sh.calls.Add(1)
	return sl, nil
}

// find is enter for those who only look. The slot is nil if there is none; none is
// then the head.
func (s *Store) find(channel string, force bool) (sl *slot, none dchannel.Head, err error) {
	sh := s.shard(channel)
	sh.mu.RLock()
	defer sh.mu.RUnlock()
	sl = sh.slots[channel]
	if sl != nil {
		sl.mu.Lock()
	}
	if !force && s.gate.Load() {
		if sl != nil {
			sl.mu.Unlock()
		}
		return nil, none, errPaused
	}
	return sl, s.noHead(), nil
}

// leave unlocks sl, and drops it if there is nothing in it worth keeping.
func (s *Store) leave(sl *slot) {
	if sl.epoch != 0 || len(sl.subs) > 0 || sl.lock != nil || len(sl.watches) > 0 || sl.forgot > s.now()-s.maxAge {
		sl.mu.Unlock()
		return
	}
	sl.gone = true
	sl.mu.Unlock()
	sh := sl.shard
	sh.mu.Lock()
	if sh.slots[sl.name] == sl {
		sh.drop(sl)
	}
	sh.mu.Unlock()
}

// make returns channel's slot, not locked. A slot that the caller found gone is
// replaced, even if whoever dropped it has not yet come to taking it out.
func (sh *shard) make(s *Store, channel string, gone *slot) *slot {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	sl := sh.slots[channel]
	if sl != nil && sl == gone {
		sh.drop(sl)
		sl = nil
	}
	if sl == nil {
		sl = &slot{store: s, shard: sh, name: channel, forgot: sh.forgot}
		sh.slots[channel] = sl
	}
	return sl
}

// drop takes sl, which is gone, out of the map. sh is locked.
func (sh *shard) drop(sl *slot) {
	sh.forgot = max(sh.forgot, sl.forgot)
	delete(sh.slots, sl.name)
}

// each calls f for every slot, locked, one after another.
func (s *Store) each(f func(*slot)) {
	for i := range s.shards {
		sh := &s.shards[i]
		sh.mu.RLock()
		slots := make([]*slot, 0, len(sh.slots))
		for _, sl := range sh.slots {
			slots = append(slots, sl)
		}
		sh.mu.RUnlock()
		for _, sl := range slots {
			sl.mu.Lock()
			if sl.gone {
				sl.mu.Unlock()
				continue
			}
			f(sl)
			s.leave(sl)
		}
	}
}

// sweeper frees what has expired in channels that nobody uses: one timer for the
// store, and none while there is nothing to expire.
type sweeper struct {
	mu    sync.Mutex
	timer *time.Timer
	due   int64 // when the timer fires; 0 when it does not
}

// sweepBy sees to it that the sweep comes at the given time, or before;
// math.MaxInt64 stands for never.
func (s *Store) sweepBy(due int64) {
	if due == math.MaxInt64 {
		return
	}
	w := &s.sweep
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.due != 0 && w.due <= due {
		return
	}
	w.due = due
	// A wait of more than an hour is cut short: the sweep then finds nothing and
	// sets the timer anew.
	wait := time.Duration(min(max(due-s.now(), 0), int64(time.Hour/time.Millisecond))) * time.Millisecond
	if w.timer != nil {
		w.timer.Reset(wait)
		return
	}
	w.timer = time.AfterFunc(wait, weakly(s, (*Store).sweepNow))
}

// sweepNow expires what is due, and sets the timer for what comes next. On a busy
// store something is always due soon, so there is a pause between two sweeps.
func (s *Store) sweepNow() {
	s.sweep.mu.Lock()
	s.sweep.due = 0
	s.sweep.mu.Unlock()
	now, next := s.now(), int64(math.MaxInt64)
	s.each(func(sl *slot) {
		sl.expire(now)
		next = min(next, sl.deadline())
	})
	if next != math.MaxInt64 {
		s.sweepBy(max(next, now+min(max(s.maxAge/16, 1), time.Minute.Milliseconds())))
	}
}
