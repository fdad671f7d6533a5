package nats

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	natsgo "github.com/nats-io/nats.go"

	"github.com/dchannel/dchannel"
)

// lockRecord is a lock after one step: the last message of its subject is its state. A hold
// counts from the server's timestamp of the message, so that no other time than the server's is
// involved; see until.
type lockRecord struct {
	Fence uint64 `json:"fence"`
	Token string `json:"token"`
	TTL   int64  `json:"ttl_ms"`
	Info  string `json:"info,omitempty"`
	Held  bool   `json:"held"`
	// Before is when, by the server, the hold that this step extends or ends was over, in nanoseconds since
	// 1970. A step that the server took later came too late: the generation had expired.
	// Somebody may have been told so, and has been told the truth, as all judge by the timestamp.
	Before int64        `json:"before,omitempty"`
	Ended  []lockEnding `json:"ended,omitempty"` // newest first
}

type lockEnding struct {
	Fence   uint64 `json:"fence"`
	Token   string `json:"token"`
	Outcome string `json:"outcome"` // in the words of dchannel.LockOutcome
}

const (
	// keptEnds is how many ends a record tells of.
	keptEnds = 4
	// lockMemory is for how long a record stays behind its generation's end.
	lockMemory = 24 * time.Hour
	// lockHeader begins a record.
	lockHeader = "dchannel lock "
)

func (r *lockRecord) endedAs(how dchannel.LockOutcome) []lockEnding {
	all := append([]lockEnding{{r.Fence, r.Token, how.String()}}, r.Ended...)
	return all[:min(len(all), keptEnds)]
}

// used tells whether the token has, or has had, its generation.
func (r *lockRecord) used(token string) bool {
	for _, e := range r.Ended {
		if e.Token == token {
			return true
		}
	}
	return r.Fence > 0 && r.Token == token
}

// judge makes of the record, which the server took at stamp, what is true at now.
func (r *lockRecord) judge(stamp, now time.Time) {
	late := r.Before != 0 && stamp.UnixNano() >= r.Before
	switch {
	case r.Held && (late || !now.Before(r.until(stamp))):
		r.Held, r.Ended = false, r.endedAs(dchannel.LockExpired)
	case !r.Held && late && len(r.Ended) > 0:
		r.Ended[0].Outcome = dchannel.LockExpired.String()
	}
}

func (r *lockRecord) until(stamp time.Time) time.Time { return stamp.Add(r.ttl()) }

func (r *lockRecord) ttl() time.Duration { return time.Duration(r.TTL) * time.Millisecond }

// state is what callers are told, but for the time left.
func (r *lockRecord) state(token string) dchannel.LockState {
	s := dchannel.LockState{
		Fence: r.Fence, Held: r.Held, TTL: r.ttl(), Info: r.Info,
		Mine: r.Fence > 0 && token != "" && r.Token == token,
	}
	for _, e := range r.Ended {
		s.Ended = append(s.Ended, dchannel.LockEnd{Fence: e.Fence, Outcome: lockOutcome(e.Outcome)})
	}
	return s
}

func lockOutcome(word string) dchannel.LockOutcome {
	for o := dchannel.LockReleased; o < dchannel.LockNone; o++ {
		if o.String() == word {
			return o
		}
	}
	return dchannel.LockForced // by a version that knows more ways
}

// lockView is a lock at one moment.
type lockView struct {
	lockRecord
	begun bool      // the last step was the generation's beginning
	place uint64    // of the last message, 0 for none
	stamp time.Time // of the last message
	now   time.Time // by the server's clock, at the moment or shortly before
}

func (v *lockView) state(token string) dchannel.LockState {
	s := v.lockRecord.state(token)
	if s.Held {
		left := v.until(v.stamp).Sub(v.now)
		s.Remaining = min(max((left+time.Millisecond-1).Truncate(time.Millisecond), time.Millisecond), s.TTL)
	}
	return s
}

// lockView reads the last message of a lock, and asks at the same time for the server's clock and
// how far the stream has come: a replica that is not there yet is asked again. It does not matter which of
// the two is answered first. A clock that is behind gives a hold more time than it has, for a moment.
func (b *Backend) lockView(ctx context.Context, name string) (v lockView, err error) {
	subject := b.names.lock(name)
	info := b.wire.start(natsgo.NewMsg("$JS.API.STREAM.INFO."+b.names.stream), one)
	o, err := b.look(ctx, basis{}, 0, []string{subject})
	if err != nil {
		b.wire.drop(info)
		return v, err
	}
	last, now, err := b.lockClock(ctx, info)
	if err != nil {
		return v, err
	}
	if o.upTo < last && !b.memory.single() {
		b.memory.see(last)
		if o, err = b.look(ctx, basis{}, 0, []string{subject}); err != nil {
			return v, err
		}
	}
	v.now = now
	for _, m := range o.answers {
		if header(m, headerSubject) == subject {
			if err := v.take(m); err != nil {
				return v, err
			}
		}
	}
	b.sawFence(v.Fence)
	return v, nil
}

// take makes the view that of message m.
func (v *lockView) take(m *natsgo.Msg) error {
	foreign := func(err error) error {
		return fmt.Errorf("%w: nats: the lock's subject holds something else: %w", dchannel.ErrRefused, err)
	}
	var err error
	v.place = number(m, headerSequence)
	if v.stamp, err = time.Parse(time.RFC3339Nano, header(m, headerStamp)); err != nil {
		return foreign(err)
	}
	data, ok := bytes.CutPrefix(m.Data, []byte(lockHeader))
	if !ok {
		return foreign(errors.New("no record of a lock"))
	}
	if err := json.Unmarshal(data, &v.lockRecord); err != nil {
		return foreign(err)
	}
	v.begun = v.Held && v.Before == 0
	if v.now.Before(v.stamp) { // the clock was answered first
		v.now = v.stamp
	}
	v.judge(v.stamp, v.now)
	return nil
}

// lockClock waits for the stream's INFO: its leader's time, which is the one that messages are stamped with, and
// the last place there is.
func (b *Backend) lockClock(ctx context.Context, c *call) (last uint64, now time.Time, err error) {
	answers, _, err := b.wire.wait(ctx, c)
	if err != nil {
		return 0, now, err
	}
	var answer struct {
		Error *apiError `json:"error"`
		State struct {
			Last uint64 `json:"last_seq"`
		} `json:"state"`
		Time time.Time `json:"ts"`
	}
	if err := json.Unmarshal(answers[0].Data, &answer); err != nil {
		return 0, now, fmt.Errorf("%w: nats: an answer that is not JSON: %w", dchannel.ErrUnavailable, err)
	}
	if answer.Error != nil {
		return 0, now, answer.Error
	}
	if answer.Time.IsZero() {
		return 0, now, fmt.Errorf("%w: nats: the server does not tell its time", dchannel.ErrUnavailable)
	}
	return answer.State.Last, answer.Time, nil
}

// step writes the record that follows v, on the condition that v is still the last one.
func (b *Backend) step(ctx context.Context, name string, v lockView, next lockRecord) (place uint64, err error) {
	body, err := json.Marshal(next)
	if err != nil {
		return 0, err
	}
	m := natsgo.NewMsg(b.names.lock(name))
	m.Header[headerExpect] = []string{strconv.FormatUint(v.place, 10)}
	m.Header[headerTTL] = []string{strconv.FormatInt(seconds(lockMemory+next.ttl()), 10) + "s"}
	m.Data = append([]byte(lockHeader), body...)
	if place, err = b.publish(ctx, m); err != nil {
		return 0, err
	}
	b.memory.see(place)
	b.sawFence(next.Fence)
	if place%lockTrim == 0 { // now and then; any of those who take steps does it
		select {
		case b.trims <- trim{subject: m.Subject, below: place}:
		default:
		}
	}
	return place, nil
}

// lockTrim is how many of the stream's messages there are, on the average, from one deletion of a lock's old records to
// the next.
const lockTrim = 64

// outcomeOf reads a step of one's own again, to learn when the server took it.
func (b *Backend) outcomeOf(ctx context.Context, name string, place uint64, next lockRecord) (v lockView, err error) {
	for try := 0; ; try++ {
		answers, err := b.getAnswers(ctx, b.startGet(getRequest{Next: b.names.lock(name), Seq: place, Batch: 1}))
		if err != nil {
			return v, err
		}
		if len(answers) > 1 {
			if err := v.take(answers[0]); err != nil {
				return v, err
			}
			if v.place == place {
				return v, nil
			}
			// It is gone, since others have come behind it: they tell how it ended.
			return v, v.replay(next)
		}
		if b.memory.single() { // removed, or a stream that is another one
			return lockView{}, nil
		}
		if err := b.behind(ctx, try, place); err != nil {
			return v, err
		}
	}
}

var errLockMoved = fmt.Errorf("%w: nats: others have taken the lock since", dchannel.ErrUncertain)

// replay makes the view that of next, with the end that a later record tells.
func (v *lockView) replay(next lockRecord) error {
	ends := v.Ended
	for len(ends) > 0 && ends[0].Fence != next.Fence {
		ends = ends[1:]
	}
	if len(ends) == 0 {
		return errLockMoved
	}
	next.Held, next.Ended = false, ends
	v.lockRecord = next
	return nil
}

func (b *Backend) sawFence(fence uint64) {
	for {
		old := b.fence.Load()
		if fence <= old || b.fence.CompareAndSwap(old, fence) {
			return
		}
	}
}

// nextFence follows the last one of the channel; it is the server's time in microseconds if that is more, so that it is
// above those that were given out before the stream lost them.
func (b *Backend) nextFence(v lockView) uint64 {
	last := v.Fence
	if last == 0 {
		last = b.fence.Load()
	}
	return max(last+1, uint64(v.now.UnixMicro()))
}
